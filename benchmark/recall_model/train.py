"""Train the recall model: python -m benchmark.recall_model.train --out DIR --minutes N

The schedule follows the clock: stages and learning rate depend on the share of --minutes that
has passed, so a run always ends on time.  `--resume` continues from DIR/last.pt; a larger
--minutes than the first run's then extends the run.  SIGTERM saves DIR/last.pt and stops.
DIR/log.jsonl holds one line of metrics every few seconds, DIR/stage-LENGTH.pt the state at the
end of each stage.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import checkpoint
from .batches import Batch, BatchQueue
from .checkpoint import Progress
from .curriculum import STAGES, learning_rate
from .flags import KnownTokens
from .lines import Kind
from .loss import SelectRows, weighted_loss
from .model import Block, RecallModel, Shape, best_dtype
from .optim import Muon
from .prepare import Data, prepare
from .scaffold import built_parameters, construct
from .threads import AdaptiveThreads

MUON_RATE = 0.005
BUILT_FACTOR = 0.2  # of MUON_RATE, for constructed matrices
EMBEDDING_RATE = 6e-4
CODE_FACTOR = 0.15  # of EMBEDDING_RATE, for the code half of the embedding
NORM_RATE = 6e-4
REPORT_SECONDS = 15
SAVE_SECONDS = 120
MIN_STAGE_STEPS = 60
SMOOTHING = 0.05


class Trainer:
    """Holds the model, its optimisers and the progress of one run."""

    def __init__(self, out: Path, data: Data, seconds: float, seed: int, threads: int) -> None:
        torch.manual_seed(seed)
        self.out, self.data, self.seconds = out, data, seconds
        shape = Shape(vocabulary=data.tokenizer.get_vocab_size())
        self.model = RecallModel(shape, best_dtype())
        self.fixed = construct(self.model, KnownTokens.of(data.lexicon), seed)
        named = list(self.model.named_parameters())
        built = built_parameters(self.model)
        self.muon = Muon(
            (
                (p, BUILT_FACTOR if n in built else 1.0)
                for n, p in named
                if p.ndim == 2 and p.requires_grad and n != "embedding"
            ),
            best_dtype(),
        )
        self.adam = torch.optim.AdamW(
            [
                {"params": [self.model.embedding]},
                {"params": [p for _, p in named if p.ndim == 1 and p.requires_grad]},
            ],
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        self.progress = Progress(seed)
        self.threads = AdaptiveThreads(threads)
        self.stopping = False
        self._log = (out / "log.jsonl").open("a")

    def compile(self) -> None:
        """Compile block and loss; one specialisation for each row length."""
        import torch._dynamo
        import torch._inductor.config as inductor

        inductor.cpp.dynamic_threads = True
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.accumulated_recompile_limit = 1024
        Block.forward = torch.compile(Block.forward, dynamic=False)  # type: ignore[method-assign]
        self._loss = torch.compile(weighted_loss, dynamic=False)

    _loss: Any = staticmethod(weighted_loss)

    def log(self, record: dict[str, Any]) -> None:
        text = json.dumps(record)
        print(text, flush=True)
        self._log.write(text + "\n")
        self._log.flush()

    def step(self, batch: Batch) -> None:
        progress = self.progress
        rate = learning_rate(progress.elapsed / self.seconds, progress.step)
        hidden = self.model.hidden(batch.ids, batch.positions).flatten(0, 1)
        selected = SelectRows.apply(hidden, batch.place)
        loss, losses, predicted = self._loss(
            selected, self.model.embedding, batch.target, batch.weight
        )
        loss.backward()
        self.muon.step(MUON_RATE * rate, min(0.95, 0.85 + progress.step / 3000))
        for group, base in zip(self.adam.param_groups, (EMBEDDING_RATE, NORM_RATE), strict=True):
            group["lr"] = base * rate
        with torch.no_grad():
            codes = self.model.embedding[:, : self.model.shape.width // 2]
            before = codes.clone()
            self.adam.step()
            codes.lerp_(before, 1 - CODE_FACTOR)
        self.fixed.hold(self.model.embedding)
        self.model.zero_grad(set_to_none=True)
        progress.step += 1
        progress.stage_step += 1
        progress.tokens += batch.ids.numel()
        right = (predicted == batch.target).numpy()
        for kind in (Kind.TEXT, Kind.ANSWER, Kind.CHAIN, Kind.STOP):
            chosen = batch.kind == kind
            if chosen.any():
                self._smooth(f"{kind.name.lower()}_loss", float(losses.numpy()[chosen].mean()))
                self._smooth(f"{kind.name.lower()}_right", float(right[chosen].mean()))

    def _smooth(self, name: str, value: float) -> None:
        running = self.progress.running
        running[name] = running.get(name, value) * (1 - SMOOTHING) + SMOOTHING * value

    def save(self, name: str) -> None:
        checkpoint.save(self.out / name, self.model, self.muon, self.adam, self.progress)

    def _stage_is_over(self) -> bool:
        progress, stage = self.progress, STAGES[self.progress.stage]
        passed = progress.running.get("answer_right", 0.0) > stage.gate
        return progress.elapsed / self.seconds > stage.until or (
            passed and progress.stage_step > MIN_STAGE_STEPS
        )

    def report(self) -> None:
        progress = self.progress
        self.log(
            {
                "elapsed": round(progress.elapsed),
                "cpu": round(time.process_time()),
                "threads": self.threads.adjust(),
                "step": progress.step,
                "tokens_m": round(progress.tokens / 1e6, 2),
                "length": STAGES[progress.stage].length,
                **{k: round(v, 4) for k, v in progress.running.items()},
            }
        )

    def request_stop(self, _signal: int, _frame: FrameType | None) -> None:
        self.stopping = True

    def run(self) -> None:
        """Train until the time is over, then save DIR/final.pt; or until asked to stop."""
        progress, started = self.progress, time.monotonic() - self.progress.elapsed
        reported = saved = time.monotonic()
        batches = BatchQueue(self.data, STAGES[progress.stage], progress.seed, progress.step)
        while progress.elapsed < self.seconds and not self.stopping:
            self.step(batches.get())
            now = time.monotonic()
            progress.elapsed = now - started
            if now - reported > REPORT_SECONDS:
                self.report()
                reported = now
            if now - saved > SAVE_SECONDS:
                self.save("last.pt")
                saved = now
            if progress.stage + 1 < len(STAGES) and self._stage_is_over():
                self.save(f"stage-{STAGES[progress.stage].length}.pt")
                batches.close()
                progress.stage, progress.stage_step = progress.stage + 1, 0
                progress.running.pop("answer_right", None)
                batches = BatchQueue(
                    self.data, STAGES[progress.stage], progress.seed, progress.step
                )
        batches.close()
        self.report()
        self.save("last.pt")
        if not self.stopping:
            self.save("final.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--minutes", type=float, default=90, help="wall-clock training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="most threads, used when free")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/last.pt")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = prepare(arguments.out / "data")
    trainer = Trainer(
        arguments.out, data, arguments.minutes * 60, arguments.seed, arguments.threads
    )
    if arguments.resume:
        trainer.progress = checkpoint.restore(
            arguments.out / "last.pt", trainer.model, trainer.muon, trainer.adam
        )
    if not arguments.no_compile:
        trainer.compile()
    signal.signal(signal.SIGTERM, trainer.request_stop)
    count = sum(p.numel() for p in trainer.model.parameters())
    trainer.log({"parameters": count, "seconds": trainer.seconds, "stages": len(STAGES)})
    trainer.run()


if __name__ == "__main__":
    main()
