"""Random generators of seeded requests on a CPU, where vLLM cannot take a sample back.

A prompt that is read in several steps is sampled in each of them, and vLLM discards all samples but the last by setting
the generator's offset back. Generators of a CPU have no offset: the call raises, and ends the engine for everybody
(vLLM 0.32, `GPUModelRunner._bookkeeping_sync`).
"""

from __future__ import annotations

import torch


class _Generator(torch.Generator):
    """A generator that starts again where vLLM sets it back: samples are discarded only before the first that counts.

    A request that was preempted reads its prompt and its output again, and starts again, too.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        del offset
        return self.manual_seed(self.initial_seed())


class CpuGenerators(dict[int, torch.Generator]):
    """`InputBatch.generators`: generators by a request's index in the batch."""

    def __setitem__(self, index: int, generator: torch.Generator) -> None:
        """Store a generator with the same seed and state that can be set back."""
        if not isinstance(generator, _Generator):
            own = _Generator()
            own.manual_seed(generator.initial_seed())
            own.set_state(generator.get_state())
            generator = own
        super().__setitem__(index, generator)
