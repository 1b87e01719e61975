"""How many devices serve each axis of parallelism."""

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes all devices left over."""

    data: int  # replicas
    fsdp: int  # parameters, gradients and moments split over it, gathered layer by layer
    expert: int  # experts split over it, tokens exchanged all to all
    tensor: int  # heads and feed-forward split over it

    def problems(self) -> list[str]:
        sizes = dataclasses.asdict(self)
        wrong = [
            f"{axis}: {size} devices cannot serve an axis; give 1 or more, or -1 for all that are left over"
            for axis, size in sizes.items()
            if size < 1 and size != -1
        ]
        open_axes = [axis for axis, size in sizes.items() if size == -1]
        wrong += [f"{axis}: {open_axes[0]} takes all devices left over already; give a size" for axis in open_axes[1:]]
        return wrong
