"""A platform of vLLM that reports GPUs which are not there."""

from __future__ import annotations

from typing import Any, NamedTuple

import vllm.platforms
from vllm.platforms.cuda import NonNvmlCudaPlatform
from vllm.platforms.interface import DeviceCapability


class Gpu(NamedTuple):
    """A model of GPU as the driver describes it. `gib` is the memory that `nvidia-smi` shows."""

    name: str
    capability: tuple[int, int]
    gib: float
    multiprocessors: int


GPUS = {
    "h100-80g": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 79.1, 132),
    "a100-80g": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 79.1, 108),
    "l40s": Gpu("NVIDIA L40S", (8, 9), 44.4, 142),
    "l4": Gpu("NVIDIA L4", (8, 9), 22.0, 58),
}

COUNT = 8


def pretend(name: str) -> Gpu:
    """Replace vLLM's platform by one with `COUNT` GPUs of a model of `GPUS`."""
    gpu = GPUS[name]

    class Pretended(NonNvmlCudaPlatform):  # type: ignore[misc]
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            del device_id
            return DeviceCapability(*gpu.capability)

        @classmethod
        def has_device_capability(cls, capability: Any, device_id: int = 0) -> bool:
            found = cls.get_device_capability(device_id)
            return bool(found >= capability if isinstance(capability, tuple) else found.to_int() >= capability)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            del device_id
            return gpu.name

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            del device_id
            return int(gpu.gib * (1 << 30))

        @classmethod
        def device_count(cls) -> int:
            return COUNT

        @classmethod
        def is_fully_connected(cls, physical_device_ids: list[int]) -> bool:
            del physical_device_ids
            return name != "l40s"

        @classmethod
        def num_compute_units(cls, device_id: int = 0) -> int:
            del device_id
            return gpu.multiprocessors

    vllm.platforms._current_platform = Pretended()
    return gpu
