"""Meshes that fit the devices, and one line about those that do not."""

from types import SimpleNamespace

import jax
import pytest
from jax.sharding import NamedSharding

from lightning_jax.parallel import RULES, MeshConfig, MeshError, make_mesh, without_sequence
from lightning_jax.parallel.mesh import arrange, resolve


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"data": 8}, (8, 1, 1, 1, 1, 1)),
        ({"data": -1, "fsdp": 2, "expert": 2}, (2, 2, 2, 1, 1, 1)),
        ({"fsdp": -1, "tensor": 2}, (1, 4, 1, 1, 1, 2)),
        ({"data": 2, "sequence": -1, "tensor": 2}, (2, 1, 1, 1, 2, 2)),
        ({"expert": 2, "expert_tensor": -1, "tensor": 2}, (1, 1, 2, 2, 1, 2)),
        ({"data": 2, "fsdp": 2, "expert": 2, "tensor": -1}, (2, 2, 2, 1, 1, 1)),
    ],
)
def test_minus_one_takes_the_devices_left_over(sizes, expected):
    mesh = make_mesh(MeshConfig.of(**sizes))
    assert mesh.axis_names == ("data", "fsdp", "expert", "expert_tensor", "sequence", "tensor")
    assert tuple(mesh.shape.values()) == expected


def test_mesh_of_some_devices():
    assert make_mesh(MeshConfig.of(expert=2), jax.devices()[2:4]).devices.ravel().tolist() == jax.devices()[2:4]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 3, "fsdp": 2},
            "mesh: data=3 x fsdp=2 needs 6 devices, 8 were found; use data=-1",
        ),
        (
            {"data": 2, "fsdp": 3},
            "mesh: data=2 x fsdp=3 needs 6 devices, 8 were found; use fsdp=-1",
        ),
        (
            {},
            "mesh: 1 on every axis needs 1 device, 8 were found; use fsdp=-1",
        ),
        (
            {"data": 3, "fsdp": -1},
            "mesh: data=3 x fsdp=-1 needs a multiple of 3 devices, 8 were found; use data=1",
        ),
        (
            {"data": 3, "fsdp": 5},
            "mesh: data=3 x fsdp=5 needs 15 devices, 8 were found; use fsdp=-1 and 1 for the others",
        ),
        (
            {"data": 0},
            "mesh.data: 0 devices cannot serve an axis; give 1 or more, or -1 for all that are left over",
        ),
        ({"fsdp": -1, "expert": -1}, "mesh.expert: fsdp takes all devices left over already; give a size"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line_with_what_would(sizes, message):
    with pytest.raises(MeshError) as error:
        resolve(MeshConfig.of(**sizes), 8)
    assert str(error.value) == message


@pytest.mark.parametrize("sizes", [{"data": 2, "sequence": 2, "tensor": 2}, {"fsdp": 2, "expert": 2, "sequence": 2}])
def test_for_generation_the_devices_of_a_sequence_join_fsdp_and_parameters_stay_where_they_are(sizes):
    training = make_mesh(MeshConfig.of(**sizes))
    generation = without_sequence(training)
    assert dict(generation.shape) == training.shape | {"fsdp": training.shape["fsdp"] * 2, "sequence": 1}
    for axes in (("experts", "expert_embed", "mlp"), ("embed", "heads")):
        places = [
            NamedSharding(mesh, RULES.spec(axes, (8,) * len(axes), mesh)).devices_indices_map((8,) * len(axes))
            for mesh in (training, generation)
        ]
        assert places[0] == places[1]


def device_of(slice_index):
    return SimpleNamespace(slice_index=slice_index, platform="cpu", device_kind="cpu", process_index=0)


@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (4, 2), (1, 8)])
def test_the_first_axes_lie_across_slices_and_the_others_within(data, fsdp):
    devices = [device_of(place % 2) for place in range(8)]
    array = arrange(MeshConfig.of(data=data, fsdp=fsdp).sizes(), devices)
    assert array.shape[:2] == (data, fsdp)
    assert [{device.slice_index for device in half} for half in array.reshape(2, 4)] == [{0}, {1}]


def test_slices_that_divide_no_axis_are_refused():
    devices = [device_of(place // 2) for place in range(6)]
    with pytest.raises(MeshError, match="3 slices do not divide the axes; use data=3"):
        arrange(MeshConfig.of(tensor=2).sizes(), devices)


@pytest.mark.parametrize("chips", [3, 5, 7])
def test_chips_that_are_no_box_of_their_slice_are_refused(chips):
    """The first of 2 x 4, where the others make rollouts."""
    places = [(x, y, 0) for y in range(4) for x in range(2)]
    devices = [SimpleNamespace(coords=place, platform="tpu") for place in places[:chips]]
    with pytest.raises(MeshError, match=f"{chips} chips of a larger slice are no box of it; use a half"):
        arrange({"fsdp": chips}, devices)
