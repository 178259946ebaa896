"""Dataclasses of the deployment section of report.json: exported forms of the models, their accuracy, time and memory."""

from dataclasses import dataclass, field

from kdlib_faces.evaluation.summary import MeasuredValue

__all__ = ["Deployment", "DeployedForm", "RuntimeRow"]


@dataclass
class DeployedForm:
    """Accuracy of one form of a model.

    Attributes:
        model: Key of the model in the report.
        form: The form, such as `"onnxruntime, int8"`.
        measures: Protocol name to the value of its first measure.
        cosine: Mean cosine of its embeddings to those of the network.
    """

    model: str
    form: str
    measures: dict[str, MeasuredValue] = field(default_factory=dict)
    cosine: float | None = None


@dataclass
class RuntimeRow:
    """Time and memory of one form of a model in one setting.

    Attributes:
        model: Key of the model in the report.
        form: The form, such as `"onnxruntime, int8"`.
        threads: Threads.
        batch: Images in one forward.
        milliseconds: Median time of a forward; None if it could not be run.
        images_per_second: Images in a second at that time.
        peak_mib: Largest memory of the process, with the runtime itself, in MiB.
        file_mib: Size of the file in MiB.
        note: Why it could not be run.
    """

    model: str
    form: str
    threads: int
    batch: int
    milliseconds: float | None = None
    images_per_second: float | None = None
    peak_mib: float | None = None
    file_mib: float | None = None
    note: str = ""


@dataclass
class Deployment:
    """Exported forms of the models.

    Attributes:
        machine: The machine of the measurements.
        forms: Accuracy of each form.
        runtimes: Time and memory.
        notes: Further sentences.
    """

    machine: str
    forms: list[DeployedForm] = field(default_factory=list)
    runtimes: list[RuntimeRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
