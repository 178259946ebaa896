"""The protocols of `--protocol`: name, syntax, description and builder."""

from dataclasses import dataclass

from kdlib_faces._checks import InputError
from kdlib_faces.data.sets.agedb import read_agedb_pairs
from kdlib_faces.data.sets.calfw import read_calfw_pairs, read_cplfw_pairs
from kdlib_faces.harness import lists, published
from kdlib_faces.harness.tasks import EvaluationTask, ProtocolSpec, Settings, TaskMaker

__all__ = ["PROTOCOLS", "ProtocolEntry", "listing"]


@dataclass(frozen=True)
class ProtocolEntry:
    """A protocol of `--protocol`.

    Attributes:
        title: Heading in the report.
        syntax: Its form on the command line, such as `"age_gap[=LIST]"`.
        description: The measures, in one line for `--help`.
        make: Makes its tasks.
    """

    title: str
    syntax: str
    description: str
    make: TaskMaker

    def build(self, spec: ProtocolSpec, settings: Settings, name: str) -> list[EvaluationTask]:
        """The tasks of one `--protocol`."""
        try:
            tasks = self.make(spec, settings, name, self.title)
        except InputError as error:  # Readers name their Python argument; the command line writes it differently.
            raise InputError(str(error).replace("published=False", "published=no")) from None
        return tasks if isinstance(tasks, list) else [tasks]


_PAIRS, _AGES = published.pairs_task, lists.age_gap_task
_AGEDB = published.published_pairs(read_agedb_pairs, "a protocol file (.mat)")
_CALFW = published.published_pairs(read_calfw_pairs, "a pairs file")
_CPLFW = published.published_pairs(read_cplfw_pairs, "a pairs file")
PROTOCOLS: dict[str, ProtocolEntry] = {
    "pairs": ProtocolEntry("Given pairs", "pairs=FILE[,images=FOLDER]", "pairs in LFW's format: accuracy over folds", _PAIRS),
    "lfw": ProtocolEntry("LFW", "lfw=pairs.txt[,images=FOLDER]", "LFW's pairs", _PAIRS),
    "bin": ProtocolEntry("A .bin set", "bin=FILE", "a .bin verification set with its images", published.bin_task),
    "agedb": ProtocolEntry("AgeDB", "agedb=FILE.mat,images=FOLDER", "AgeDB's pairs 5, 10, 20 or 30 years apart", _AGEDB),
    "calfw": ProtocolEntry("CALFW", "calfw=FILE,images=FOLDER", "CALFW's pairs, across age", _CALFW),
    "cplfw": ProtocolEntry("CPLFW", "cplfw=FILE,images=FOLDER", "CPLFW's pairs, across pose", _CPLFW),
    "cfp": ProtocolEntry("CFP", "cfp=FOLDER[,kind=FF]", "CFP's pairs, frontal and profile", published.cfp_task),
    "cacd_vs": ProtocolEntry("CACD-VS", "cacd_vs=FOLDER", "CACD's pairs, across age", published.cacd_task),
    "fgnet": ProtocolEntry("FG-NET, leave one image out", "fgnet=FOLDER", "identification and CMC, by age and gap", published.fgnet_task),
    "megaface_fgnet": ProtocolEntry(
        "FG-NET among distractors", "megaface_fgnet=FOLDER[,distractors=FOLDER]", "MegaFace challenge 1 on FG-NET",
        published.distractors_task,
    ),
    "ijbb": ProtocolEntry("IJB-B", "ijbb=FOLDER[,images=FOLDER][,norm=unit]", "templates, 1:1 and 1:N", published.ijb_task),
    "ijbc": ProtocolEntry("IJB-C", "ijbc=FOLDER[,images=FOLDER][,norm=unit]", "templates, 1:1 and 1:N", published.ijb_task),
    "age_gap": ProtocolEntry("By age gap", "age_gap[=LIST]", "all pairs by the years between the images", _AGES),
    "age_group": ProtocolEntry("By age groups", "age_group[=LIST]", "all pairs by the two images' age groups", _AGES),
    "between_groups": ProtocolEntry(
        "One age group against another", "between_groups[=LIST]", "one age group against another, as in LAG",
        lists.between_groups_task,
    ),
    "age_errors": ProtocolEntry("Errors by age", "age_errors[=LIST]", "FNMR and FMR by gap and age, slopes", lists.age_errors_task),
    "longitudinal": ProtocolEntry(
        "Over the years", "longitudinal[=LIST][,reference=all]", "an identity's scores over the years; our own",
        lists.longitudinal_task,
    ),
    "leave_one_out": ProtocolEntry(
        "Leave-one-out identification", "leave_one_out[=LIST]", "identification, each image against all others",
        lists.leave_one_out_task,
    ),
}  # fmt: skip


def listing() -> str:
    """One line per protocol, for `--help`."""
    width = max(len(entry.syntax) for entry in PROTOCOLS.values())
    return "\n".join(f"  {entry.syntax:<{width}}  {entry.description}" for entry in PROTOCOLS.values())
