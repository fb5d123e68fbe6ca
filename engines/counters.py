"""What an engine counts since its start."""

from __future__ import annotations

from dataclasses import dataclass

from engines.block_pool import BlockPool
from engines.scheduler import Scheduler
from engines.speculation import Speculation
from engines.types import EngineStats


@dataclass(slots=True)
class Counters:
    """Counts of the step's own, under the names that EngineStats explains."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    aborted: int = 0
    drafted: int = 0
    accepted: int = 0
    step_time_s: float = 0.0

    def snapshot(self, scheduler: Scheduler, pool: BlockPool, speculation: Speculation) -> EngineStats:
        """These counts, and how things stand with the queues, the blocks and the drafters."""
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks_total=pool.num_blocks,
            num_blocks_used=pool.num_used,
            num_blocks_cached=pool.num_cached,
            num_steps=self.steps,
            num_prompt_tokens=self.prompt_tokens,
            num_cached_tokens=self.cached_tokens,
            num_generated_tokens=self.generated_tokens,
            num_preemptions=self.preemptions,
            num_finished=self.finished,
            num_aborted=self.aborted,
            num_drafted_tokens=self.drafted,
            num_accepted_tokens=self.accepted,
            step_time_s=self.step_time_s,
            speculation_time_s=speculation.speculator.time_s,
            speculation_plain_time_s=speculation.speculator.plain_time_s,
            num_speculation_failures=speculation.num_failures,
            drafters=speculation.stats(),
        )
