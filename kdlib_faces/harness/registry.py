"""Recipe: the names that `--protocol` knows, what each wants, and who builds it."""

from collections.abc import Callable
from dataclasses import dataclass

from kdlib_faces._checks import InputError
from kdlib_faces.harness import published as sets
from kdlib_faces.harness.lists import age_errors_task, ages_task, groups_task, leave_one_out_task
from kdlib_faces.harness.tasks import Asked, Settings, Task

__all__ = ["PROTOCOLS", "Known", "listing"]

Build = Callable[[Asked, Settings, str, str], Task]


@dataclass(frozen=True)
class Known:
    """A protocol: its heading, how it is spelled, what it measures, and its builder."""

    title: str
    spelling: str
    what: str
    make: Callable[[Asked, Settings, str, str], Task | list[Task]]

    def build(self, asked: Asked, settings: Settings, name: str, title: str) -> list[Task]:
        """The tasks of one `--protocol`."""
        try:
            made = self.make(asked, settings, name, title)
        except InputError as error:  # readers speak of their own argument, here it is spelled otherwise
            raise InputError(str(error).replace("published=False", "published=no")) from None
        return made if isinstance(made, list) else [made]


PROTOCOLS: dict[str, Known] = {
    "pairs": Known("Given pairs", "pairs=FILE[,images=FOLDER]", "pairs in LFW's format: accuracy over folds", sets.pairs_task),
    "lfw": Known("LFW", "lfw=pairs.txt[,images=FOLDER]", "LFW's pairs", sets.pairs_task),
    "bin": Known("A .bin set", "bin=FILE", "a .bin verification set, its images inside", sets.bin_task),
    "agedb": Known("AgeDB", "agedb=FILE.mat,images=FOLDER", "AgeDB's pairs 5, 10, 20 or 30 years apart", sets.agedb_task),
    "calfw": Known("CALFW", "calfw=FILE,images=FOLDER", "CALFW's pairs, across age", sets.calfw_task),
    "cplfw": Known("CPLFW", "cplfw=FILE,images=FOLDER", "CPLFW's pairs, across pose", sets.cplfw_task),
    "cfp": Known("CFP", "cfp=FOLDER[,kind=FF]", "CFP's pairs, frontal and profile", sets.cfp_task),
    "cacd_vs": Known("CACD-VS", "cacd_vs=FOLDER", "CACD's pairs, across age", sets.cacd_task),
    "fgnet": Known("FG-NET, leave one image out", "fgnet=FOLDER", "identification and CMC, by age and gap", sets.fgnet_task),
    "megaface_fgnet": Known(
        "FG-NET among distractors", "megaface_fgnet=FOLDER[,distractors=FOLDER]", "MegaFace challenge 1 on FG-NET",
        sets.distractors_task,
    ),
    "ijbb": Known("IJB-B", "ijbb=FOLDER[,images=FOLDER][,norm=unit]", "templates, 1:1 and 1:N", sets.ijb_task),
    "ijbc": Known("IJB-C", "ijbc=FOLDER[,images=FOLDER][,norm=unit]", "templates, 1:1 and 1:N", sets.ijb_task),
    "age_gap": Known("By age gap", "age_gap[=LIST]", "all pairs by the years between the images", ages_task),
    "age_group": Known("By age groups", "age_group[=LIST]", "all pairs by the two images' age groups", ages_task),
    "between_groups": Known(
        "One age group against another", "between_groups[=LIST]", "young against adult, as LAG has them", groups_task
    ),
    "age_errors": Known("Errors by age", "age_errors[=LIST]", "FNMR and FMR by gap and age, slopes", age_errors_task),
    "longitudinal": Known(
        "Over the years", "longitudinal[=LIST][,reference=all]", "a person's score over years; our own", sets.longitudinal_task
    ),
    "leave_one_out": Known(
        "Each image among the others", "leave_one_out[=LIST]", "identification, each image against all others",
        leave_one_out_task,
    ),
}  # fmt: skip


def listing() -> str:
    """One line a protocol, for `--help`."""
    widest = max(len(known.spelling) for known in PROTOCOLS.values())
    return "\n".join(f"  {known.spelling:<{widest}}  {known.what}" for known in PROTOCOLS.values())
