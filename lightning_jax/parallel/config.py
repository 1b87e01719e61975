"""How many devices serve each axis of parallelism, and how what they share is kept and added up."""

from dataclasses import dataclass
from typing import Literal, Self

AXES = ("data", "fsdp", "expert", "expert_tensor", "sequence", "tensor")

SequenceAttention = Literal["ring", "all_gather"]
GradientDtype = Literal["compute", "float32"]


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes, one of which may be -1 and takes all devices left over; the layout besides."""

    data: int  # replicas
    fsdp: int  # parameters, gradients and moments split over it, gathered layer by layer
    expert: int  # experts split over it, tokens exchanged all to all
    expert_tensor: int  # each expert's feed-forward split over it and "tensor", rows over it for everything else
    sequence: int  # tokens of each row split over it; lightning layers send states, softmax layers keys and values
    tensor: int  # heads and feed-forward split over it
    sequence_attention: SequenceAttention  # how keys and values of a split sequence travel: in turns, or all at once
    gradient_dtype: GradientDtype  # in which devices add up their parts of a gradient; "compute": in the model's
    moments: Literal["device", "host"]  # where the optimizer's moments wait between steps

    @classmethod
    def of(cls, **sizes: int) -> Self:
        """With these sizes, 1 for the other axes, and the layout besides that all recipes have."""
        others = {"sequence_attention": "ring", "gradient_dtype": "compute", "moments": "device"}
        return cls(**dict.fromkeys(AXES, 1) | sizes, **others)

    def sizes(self) -> dict[str, int]:
        """The size of each axis, from the axis whose devices are furthest apart to that of neighbours."""
        return {axis: getattr(self, axis) for axis in AXES}

    def problems(self) -> list[str]:
        sizes = self.sizes()
        wrong = [
            f"{axis}: {size} devices cannot serve an axis; give 1 or more, or -1 for all that are left over"
            for axis, size in sizes.items()
            if size < 1 and size != -1
        ]
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        wrong += [f"{axis}: {open_axes[0]} takes all devices left over already; give a size" for axis in open_axes[1:]]
        return wrong
