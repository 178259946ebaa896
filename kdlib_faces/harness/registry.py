"""Recipe: the names that `--protocol` knows, what each wants, and who builds it."""

from collections.abc import Callable
from dataclasses import dataclass

from kdlib_faces._checks import InputError
from kdlib_faces.harness import published as sets
from kdlib_faces.harness.lists import age_errors_task, ages_task, groups_task, leave_one_out_task
from kdlib_faces.harness.tasks import EvaluationTask, ProtocolSpec, Settings

__all__ = ["PROTOCOLS", "ProtocolEntry", "listing"]

Build = Callable[[ProtocolSpec, Settings, str, str], EvaluationTask]


@dataclass(frozen=True)
class ProtocolEntry:
    """A protocol: its heading, how it is spelled, what it measures, and its builder."""

    title: str
    spelling: str
    what: str
    make: Callable[[ProtocolSpec, Settings, str, str], EvaluationTask | list[EvaluationTask]]

    def build(self, asked: ProtocolSpec, settings: Settings, name: str, title: str) -> list[EvaluationTask]:
        """The tasks of one `--protocol`."""
        try:
            made = self.make(asked, settings, name, title)
        except InputError as error:  # readers speak of their own argument, here it is spelled otherwise
            raise InputError(str(error).replace("published=False", "published=no")) from None
        return made if isinstance(made, list) else [made]


PROTOCOLS: dict[str, ProtocolEntry] = {
    "pairs": ProtocolEntry("Given pairs", "pairs=FILE[,images=FOLDER]", "pairs in LFW's format: accuracy over folds", sets.pairs_task),
    "lfw": ProtocolEntry("LFW", "lfw=pairs.txt[,images=FOLDER]", "LFW's pairs", sets.pairs_task),
    "bin": ProtocolEntry("A .bin set", "bin=FILE", "a .bin verification set, its images inside", sets.bin_task),
    "agedb": ProtocolEntry("AgeDB", "agedb=FILE.mat,images=FOLDER", "AgeDB's pairs 5, 10, 20 or 30 years apart", sets.agedb_task),
    "calfw": ProtocolEntry("CALFW", "calfw=FILE,images=FOLDER", "CALFW's pairs, across age", sets.calfw_task),
    "cplfw": ProtocolEntry("CPLFW", "cplfw=FILE,images=FOLDER", "CPLFW's pairs, across pose", sets.cplfw_task),
    "cfp": ProtocolEntry("CFP", "cfp=FOLDER[,kind=FF]", "CFP's pairs, frontal and profile", sets.cfp_task),
    "cacd_vs": ProtocolEntry("CACD-VS", "cacd_vs=FOLDER", "CACD's pairs, across age", sets.cacd_task),
    "fgnet": ProtocolEntry("FG-NET, leave one image out", "fgnet=FOLDER", "identification and CMC, by age and gap", sets.fgnet_task),
    "megaface_fgnet": ProtocolEntry(
        "FG-NET among distractors", "megaface_fgnet=FOLDER[,distractors=FOLDER]", "MegaFace challenge 1 on FG-NET",
        sets.distractors_task,
    ),
    "ijbb": ProtocolEntry("IJB-B", "ijbb=FOLDER[,images=FOLDER][,norm=unit]", "templates, 1:1 and 1:N", sets.ijb_task),
    "ijbc": ProtocolEntry("IJB-C", "ijbc=FOLDER[,images=FOLDER][,norm=unit]", "templates, 1:1 and 1:N", sets.ijb_task),
    "age_gap": ProtocolEntry("By age gap", "age_gap[=LIST]", "all pairs by the years between the images", ages_task),
    "age_group": ProtocolEntry("By age groups", "age_group[=LIST]", "all pairs by the two images' age groups", ages_task),
    "between_groups": ProtocolEntry(
        "One age group against another", "between_groups[=LIST]", "young against adult, as LAG has them", groups_task
    ),
    "age_errors": ProtocolEntry("Errors by age", "age_errors[=LIST]", "FNMR and FMR by gap and age, slopes", age_errors_task),
    "longitudinal": ProtocolEntry(
        "Over the years", "longitudinal[=LIST][,reference=all]", "a person's score over years; our own", sets.longitudinal_task
    ),
    "leave_one_out": ProtocolEntry(
        "Each image among the others", "leave_one_out[=LIST]", "identification, each image against all others",
        leave_one_out_task,
    ),
}  # fmt: skip


def listing() -> str:
    """One line a protocol, for `--help`."""
    widest = max(len(known.spelling) for known in PROTOCOLS.values())
    return "\n".join(f"  {known.spelling:<{widest}}  {known.what}" for known in PROTOCOLS.values())
