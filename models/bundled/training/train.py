"""Train the bundled model from random weights on synthetic pictures, on one CPU core.

    python -m vlmserve.models.bundled.training.train --seed 0 --minutes 90 --out runs/bundled

First the vision encoder alone learns to predict what each patch shows (auxiliary.py). Then the
whole model learns to answer, with the first task at a smaller weight. The clock drives the
schedule, so a run takes --minutes; --resume continues from the last state saved in --out. All files
are safetensors and JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import MllamaForConditionalGeneration

from ...decoder.mllama_fixes import mend
from ..dataset.config import save_checkpoint
from ..dataset.data import IGNORE, Batch, Conversations, Mixture, Pictures, Rows
from ..dataset.tokenizer import Encoder, build_tokenizer
from .auxiliary import PictureHeads, accuracies
from .initial import untrained_model

_WARM_UP_STEPS = 150
_LOG_S, _SAVE_S = 20.0, 240.0


@dataclass(frozen=True, slots=True)
class Settings:
    """One run. minutes: of the whole run; vision_share: of it, for the encoder alone."""

    seed: int
    minutes: float
    out: Path
    vision_share: float = 0.17
    learning_rate: float = 1.3e-3
    auxiliary_weight: float = 0.4
    batch_size: int = 32
    max_shapes: int = 4


class Trainee(nn.Module):
    """The model under `mend`, with the heads that are not saved."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model: MllamaForConditionalGeneration = mend(untrained_model(seed))
        self.heads = PictureHeads()

    def see(self, pictures: Pictures) -> Tensor:
        """The vision features, [pictures, 1, 4, 17, 384]."""
        vision = self.model.model.vision_model
        return vision(
            pictures.pixel_values, pictures.aspect_ratio_ids, pictures.aspect_ratio_mask
        ).last_hidden_state


def answer_loss(
    model: MllamaForConditionalGeneration, features: Tensor, tile_mask: Tensor, buckets: list[Rows]
) -> Tensor:
    """Mean cross entropy over all answer tokens; one vision pass serves all rows.

    features: of the vision encoder, [pictures, 1, 4, 17, 384].
    """
    states = model.model.multi_modal_projector(features).flatten(1, 3)
    losses, num_targets = [], 0
    for rows in buckets:
        hidden = _read(model, states, tile_mask, rows)
        is_learned = rows.targets != IGNORE
        logits = model.lm_head(hidden[is_learned]).float()
        targets = rows.targets[is_learned]
        losses.append(functional.cross_entropy(logits, targets, reduction="sum"))
        num_targets += len(targets)
    return torch.stack(losses).sum() / num_targets


def _read(
    model: MllamaForConditionalGeneration, states: Tensor, tile_mask: Tensor, rows: Rows
) -> Tensor:
    """The decoder's last hidden states, [rows, tokens, hidden]."""
    sees_tiles = rows.sees[..., None] * tile_mask[rows.pictures, 0][:, None]
    hidden: Tensor = model.model(
        input_ids=rows.input_ids,
        cross_attention_states=states[rows.pictures].flatten(1, 2),
        cross_attention_mask=sees_tiles,
        use_cache=False,
    ).last_hidden_state
    return hidden


class Run:
    """A training run: its trainee, optimiser, clock and files."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.trainee = Trainee(settings.seed)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.trainee), lr=settings.learning_rate, betas=(0.9, 0.98)
        )
        self.step = 0
        self.elapsed_s = 0.0
        self.is_stopped = False

    @property
    def progress(self) -> float:
        """The share of the time that has passed."""
        return min(1.0, self.elapsed_s / (self.settings.minutes * 60))

    @property
    def is_vision_only(self) -> bool:
        """Whether the encoder still learns alone."""
        return self.progress < self.settings.vision_share

    def learning_rate(self) -> float:
        """Warm-up, then constant while vision learns alone, then a cosine down to 2 %."""
        share = self.settings.vision_share
        joint = max(0.0, (self.progress - share) / (1 - share)) if share < 1 else 0.0
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * joint))
        return self.settings.learning_rate * cosine * min(1.0, (self.step + 1) / _WARM_UP_STEPS)

    def train(self) -> None:
        """Train until the time is over or `stop` is called, then save state and checkpoint."""
        while self.progress < 1 and not self.is_stopped:
            is_vision_only = self.is_vision_only
            for batch in self._batches(is_vision_only):
                self._timed_step(batch)
                if self.is_stopped or self.progress >= 1 or self.is_vision_only != is_vision_only:
                    break
        self.save()

    def stop(self) -> None:
        """Stop after the current step."""
        self.is_stopped = True

    def save(self) -> None:
        """Write the state to resume from, and the checkpoint."""
        self.settings.out.mkdir(parents=True, exist_ok=True)
        _save_state(self, self.settings.out / "state")
        save_checkpoint(self.trainee.model, self.settings.out / "checkpoint")

    def _batches(self, is_vision_only: bool) -> Iterator[Batch]:
        """Batches that another process prepares."""
        settings = self.settings
        mixture = Mixture(
            batch_size=settings.batch_size,
            rows_per_picture=0 if is_vision_only else 3,
            max_shapes=settings.max_shapes,
        )
        encoder = Encoder(build_tokenizer())
        data = Conversations(encoder, mixture, settings.seed, first=self.step)
        return iter(DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=6))

    def _timed_step(self, batch: Batch) -> None:
        started = time.monotonic()
        losses = self._step(batch)
        before = self.elapsed_s
        self.elapsed_s += time.monotonic() - started
        if self.elapsed_s // _LOG_S > before // _LOG_S:
            self._log(batch, losses)
        if self.elapsed_s // _SAVE_S > before // _SAVE_S:
            self.save()

    def _step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; the losses by name."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with torch.autocast("cpu", torch.bfloat16):
            features = self.trainee.see(batch.pictures)
            losses = self.trainee.heads(features, batch.pictures)
            total = sum(losses.values(), torch.zeros(()))
            if batch.buckets:
                mask = batch.pictures.aspect_ratio_mask
                losses["answer"] = answer_loss(self.trainee.model, features, mask, batch.buckets)
                total = losses["answer"] + self.settings.auxiliary_weight * total
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def _log(self, batch: Batch, losses: dict[str, float]) -> None:
        """Print one JSON line: progress, losses, and the heads' accuracy."""
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            right = accuracies(self.trainee.heads, self.trainee.see(batch.pictures), batch.pictures)
        line = {
            "minutes": round(self.elapsed_s / 60, 2),
            "step": self.step,
            "learning_rate": round(self.learning_rate(), 6),
            "loss": {name: round(value, 4) for name, value in losses.items()},
            "right": {name: round(value, 3) for name, value in right.items()},
        }
        print(json.dumps(line), flush=True)


def resume(run: Run) -> None:
    """Load the state saved in the run's folder. Raises FileNotFoundError if there is none."""
    folder = run.settings.out / "state"
    run.trainee.load_state_dict(load_file(folder / "trainee.safetensors"))
    moments = load_file(folder / "optimizer.safetensors")
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(parameters):
        names = [name for name in ("exp_avg", "exp_avg_sq", "step") if f"{i}.{name}" in moments]
        if names:
            run.optimizer.state[parameter] = {name: moments[f"{i}.{name}"] for name in names}
    saved = json.loads((folder / "run.json").read_text())
    run.step, run.elapsed_s = saved["step"], saved["elapsed_s"]


def _save_state(run: Run, folder: Path) -> None:
    """Save weights and moments in float32, and the progress."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(run.trainee.state_dict()), folder / "trainee.safetensors")
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    moments = {
        f"{i}.{name}": value
        for i, parameter in enumerate(parameters)
        for name, value in run.optimizer.state.get(parameter, {}).items()
    }
    save_file(moments, folder / "optimizer.safetensors")
    settings = asdict(run.settings) | {"out": run.settings.out.name}
    saved = {"step": run.step, "elapsed_s": run.elapsed_s, "settings": settings}
    (folder / "run.json").write_text(json.dumps(saved, indent=2))


def _parameter_groups(module: nn.Module) -> list[dict[str, object]]:
    """Weight decay for matrices, none for gates, norms and biases."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, required=True, help="of training, in all")
    parser.add_argument("--out", type=Path, required=True, help="folder for state and checkpoint")
    parser.add_argument("--resume", action="store_true", help="continue from the state in --out")
    for field in fields(Settings):
        if field.default is not MISSING:
            option = "--" + field.name.replace("_", "-")
            parser.add_argument(option, type=type(field.default), default=field.default)
    options = vars(parser.parse_args())
    is_resumed = options.pop("resume")
    torch.set_num_threads(1)
    run = Run(Settings(**options))
    if is_resumed:
        resume(run)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: run.stop())
    run.train()


if __name__ == "__main__":
    main()
