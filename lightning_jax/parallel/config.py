"""How many devices serve each axis of parallelism."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1, which takes all devices left over."""

    data: int  # replicas
    fsdp: int  # parameters, gradients and moments split over it, gathered layer by layer
    expert: int  # experts split over it, tokens exchanged all to all
    tensor: int  # heads and feed-forward split over it
