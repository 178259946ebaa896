# [teachers]
kdlib-faces train --recipe general_teacher --data web.csv --output general \
    --set recipe.width=0.5 --set recipe.input_size=32 --set recipe.embedding_dim=64 \
    --set training.steps=200 --set training.lr=0.05 --set training.batch_size=32
kdlib-faces train --recipe age_teacher --data ages.csv --output age \
    --set network.width=0.5 --set network.input_size=32 --set network.embedding_dim=64 \
    --set training.steps=200 --set training.lr=0.05 --set training.batch_size=32
# [students]
kdlib-faces train --recipe student --data ages.csv --output alone \
    --set recipe.width=0.25 --set recipe.input_size=32 --set recipe.embedding_dim=64 \
    --set training.steps=200 --set training.lr=0.05 --set training.batch_size=32
kdlib-faces train --recipe liaad --data ages.csv --output distilled \
    --teacher general/teacher.safetensors --teacher age/teacher.safetensors --set recipe.embedding_projection=linear \
    --set recipe.width=0.25 --set recipe.input_size=32 --set recipe.embedding_dim=64 \
    --set training.steps=200 --set training.lr=0.05 --set training.batch_size=32
# [evaluation]
kdlib-faces evaluate --protocol age_gap=new.csv --output evaluation --set replicates=100 --set num_failures=0 \
    --model general=general/teacher.safetensors --model age=age/teacher.safetensors \
    --model alone=alone/student.safetensors --model distilled=distilled/student.safetensors
# [export]
kdlib-faces export distilled/student.safetensors --format int8 --data ages.csv --max-loss 0.05 --output student_int8.onnx
