"""all-MiniLM-L6-v2 with frozen zero-shot heads: a text's class is the label whose own embedding, by the
base, is nearest (the protocol of the CLIP benchmarks of model merging)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

try:
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel
except ImportError as error:
    raise SystemExit(f"error: the bench runs an encoder ({error}): pip install -e '.[quality]'") from None

from . import sources
from .tasks import Task

SCALE = 20.0  # of cosines, as logits
_TOKENS, _BATCH = 32, 100


def base_folder(cache: Path) -> Path:
    """The base as a Hugging Face folder, without the pooler, which no task trains."""
    folder = cache / "base"
    if not (folder / "model.safetensors").exists():
        found = sources.fetch(cache)["weights"]
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(found / name, folder)
        stored = load_file(found / "model.safetensors")
        kept = {k: v for k, v in stored.items() if "pooler" not in k and "position_ids" not in k}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class Encoder:
    """The model, its tokenizer, and the heads of some tasks. folder: the base's."""

    def __init__(self, folder: Path, tasks: dict[str, Task]) -> None:
        self.model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_TOKENS)
        self._tasks = tasks
        self.load(folder)
        with torch.no_grad():
            self.heads = {name: self.embed(self.tokens(task.labels)) for name, task in tasks.items()}

    def load(self, folder: Path) -> None:
        """The weights of a folder, all of them."""
        weights: dict[str, torch.Tensor] = {}
        for path in folder.glob("model*.safetensors"):
            weights |= load_file(path)
        self.model.load_state_dict(weights)
        self.model.eval()

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._tokenizer.encode_batch(list(texts))]

    def embed(self, tokens: list[list[int]]) -> torch.Tensor:
        """Mean embeddings of norm 1: float32[texts, 384]."""
        width = max(map(len, tokens))
        ids = torch.tensor([t + [0] * (width - len(t)) for t in tokens])
        mask = torch.tensor([[1] * len(t) + [0] * (width - len(t)) for t in tokens])
        with torch.autocast("cpu", torch.bfloat16):  # a third of the time; weights and gradients stay float32
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden.float() * mask[..., None]
        return functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=-1)

    def save_squared_gradients(self, name: str, path: Path, texts: int = 100) -> None:
        """The mean of squared gradients of training texts, one at a time, at these weights: an estimate of
        second moments where no optimizer's are left."""
        total = {key: torch.zeros_like(p) for key, p in self.model.named_parameters()}
        for text, label in self._tasks[name].train[:texts]:
            self.model.zero_grad(set_to_none=True)
            logits = SCALE * self.embed(self.tokens([text])) @ self.heads[name].T
            functional.cross_entropy(logits, torch.tensor([label])).backward()
            for key, parameter in self.model.named_parameters():
                total[key].addcmul_(parameter.grad, parameter.grad, value=1 / texts)
        save_file(total, path, metadata={"format": "pt"})

    @torch.no_grad()
    def right(self, name: str, rows: Sequence[tuple[str, int]]) -> str:
        """A character for each text: 1 where it gets its label."""
        tokens = self.tokens([text for text, _ in rows])
        order = sorted(range(len(rows)), key=lambda i: len(tokens[i]))
        found = ["0"] * len(rows)
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            logits = self.embed([tokens[i] for i in batch]) @ self.heads[name].T
            for i, label in zip(batch, logits.argmax(1).tolist(), strict=True):
                found[i] = "01"[label == rows[i][1]]
        return "".join(found)
