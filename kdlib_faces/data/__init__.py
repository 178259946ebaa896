"""Images, ages and identities from lists, folders, records, shards and face sets; images are decoded on demand."""

from kdlib_faces.data.batches import FaceBatches
from kdlib_faces.data.dataset import FaceImages
from kdlib_faces.data.formats.bin import BinSet, load_bin, save_bin
from kdlib_faces.data.formats.record_format import IdentityRanges, Record, RecordProperties, read_property
from kdlib_faces.data.formats.record_reader import RecordReader
from kdlib_faces.data.formats.record_writer import save_records
from kdlib_faces.data.image_pairs import ImagePairs, PairList
from kdlib_faces.data.landmarks import five_points, read_points
from kdlib_faces.data.lists import FaceDataWarning, FaceList, read_faces
from kdlib_faces.data.sets.agedb import AgeDBName, parse_agedb_name, read_agedb, read_agedb_pairs
from kdlib_faces.data.sets.cacd import cacd_vs_pairs
from kdlib_faces.data.sets.calfw import read_calfw_pairs, read_cplfw_pairs
from kdlib_faces.data.sets.cfp import read_cfp_pairs
from kdlib_faces.data.sets.fgnet import FGNetName, parse_fgnet_name, read_fgnet
from kdlib_faces.data.sets.ijb import IJBSet, read_ijb
from kdlib_faces.data.sets.ijb_lists import (
    IJBLandmarks,
    IJBPairs,
    IJBSubjects,
    IJBTemplates,
    read_ijb_landmarks,
    read_ijb_pairs,
    read_ijb_subjects,
    read_ijb_templates,
)
from kdlib_faces.data.sets.lfw import read_lfw_pairs
from kdlib_faces.data.sets.longitudinal import LongitudinalList, read_longitudinal
from kdlib_faces.data.sets.megaface import (
    FeatureSet,
    TemplateList,
    read_feature_file,
    read_template_list,
    write_feature_file,
)
from kdlib_faces.data.synthetic import SyntheticFace, SyntheticFaces

__all__ = [
    "AgeDBName", "BinSet", "FGNetName", "FaceBatches", "FaceDataWarning", "FaceImages", "FaceList", "FeatureSet", "IJBLandmarks", "IJBPairs", "IJBSet",
    "IJBSubjects", "IJBTemplates", "IdentityRanges", "ImagePairs", "LongitudinalList", "PairList", "Record",
    "RecordProperties", "RecordReader", "SyntheticFace", "SyntheticFaces", "TemplateList", "cacd_vs_pairs",
    "five_points", "load_bin", "parse_agedb_name", "parse_fgnet_name", "read_agedb", "read_agedb_pairs",
    "read_calfw_pairs", "read_cfp_pairs", "read_cplfw_pairs", "read_faces", "read_feature_file", "read_fgnet",
    "read_ijb", "read_ijb_landmarks", "read_ijb_pairs", "read_ijb_subjects", "read_ijb_templates", "read_lfw_pairs",
    "read_longitudinal", "read_points", "read_property", "read_template_list", "save_bin",
    "save_records", "write_feature_file",
]  # fmt: skip
