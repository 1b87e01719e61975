"""How many devices serve each axis of parallelism."""

from dataclasses import dataclass
from typing import Literal, Self

AXES = ("data", "fsdp", "expert", "sequence", "tensor")

SequenceAttention = Literal["ring", "all_gather"]


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes all devices left over."""

    data: int  # replicas
    fsdp: int  # parameters, gradients and moments split over it, gathered layer by layer
    expert: int  # experts split over it, tokens exchanged all to all
    sequence: int  # tokens of each row split over it; lightning layers send states, softmax layers keys and values
    tensor: int  # heads and feed-forward split over it
    sequence_attention: SequenceAttention  # how keys and values of a split sequence travel: in turns, or all at once

    @classmethod
    def of(cls, **sizes: int) -> Self:
        """With these sizes, and 1 for the other axes."""
        return cls(**dict.fromkeys(AXES, 1) | sizes, sequence_attention="ring")

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
