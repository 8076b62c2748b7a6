"""Print a recipe: the settings of a paper, a study, a launch file, or PromptKD in one flat file.

Without a name it lists the recipes. Those for `distill` are taken by their name, or printed, edited and taken as files.

    promptkd recipe
    promptkd distill --config gkd --student STUDENT --teacher TEACHER --data train.jsonl --out runs/gkd
    promptkd recipe gkd > mine.yaml
    promptkd recipe launch/fsdp2 > fsdp2.yaml
"""

from dataclasses import dataclass

POSITIONAL = "name"


@dataclass
class Options:
    name: str | None = None
    """The recipe to print; by default all are listed."""
