"""`nsa-port demo`: train a small language model with NSA next to the same one with dense attention.

Both see the same bytes in the same order and start from the same weights where they have the same
ones. The run says which backend NSA took and why, compares both on text they were not trained on,
and lets the NSA model write through its cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nsa_port import environment
from nsa_port.introspect import Explanation, explain
from nsa_port.kernels.geometry import NSAConfig
from nsa_port.language_model import ByteLanguageModel, ModelSize

HELD_OUT = 0.05
TOLERANCE = 1.02
_SEED = 0


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a run the device is up to.

    Args:
        size: the model.
        config: NSA's geometry, such that a query sees a small part of `length` tokens.
        length: bytes of a training sequence.
        batch: sequences of a step.
        held_out: sequences that the comparison is made on.
        learning_rate: at its highest.
        seconds: how long to train.
        steps: the most steps.
        dtype: what the matrix products run in.
    """

    size: ModelSize
    config: NSAConfig
    length: int
    batch: int
    held_out: int
    learning_rate: float
    seconds: float
    steps: int
    dtype: torch.dtype = torch.float32


_CPU = Scale(
    size=ModelSize(layers=2, hidden_size=128, num_heads=4, num_kv_heads=1, head_dim=32),
    config=NSAConfig(16, 8, 16, 4, 1, 1, 32),
    length=512,
    batch=2,
    held_out=32,
    learning_rate=3e-3,
    seconds=100.0,
    steps=2000,
)
_GPU = Scale(
    size=ModelSize(layers=6, hidden_size=512, num_heads=16, num_kv_heads=1, head_dim=64),
    config=NSAConfig(32, 16, 64, 8, 1, 2, 256),
    length=4096,
    batch=8,
    held_out=16,
    learning_rate=1e-3,
    seconds=100.0,
    steps=2000,
    dtype=torch.bfloat16,
)


def scale_for(device: torch.device) -> Scale:
    """The run for a device."""
    return _CPU if device.type == "cpu" else _GPU


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE",
        help="text to learn; by default the sources of Python's standard library",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help="how long to train, both models together")
    parser.add_argument("--steps", type=int, help="train this many steps, however long they take")
    parser.add_argument("--device", help="cpu, cuda, ...; the accelerator if there is one")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="save the loss curves")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def main(args: argparse.Namespace) -> int:
    """Run the demonstration; returns the exit code."""
    say: Callable[[str], None] = _say_nothing if args.json else print
    try:
        if args.out is not None:
            require_matplotlib()
        device = torch.device(args.device) if args.device else environment.default_device()
        scale = scale_for(device)
        source, text = read_text(args.file)
        data = Data(text, scale, device)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"nsa-port demo: {error}", file=sys.stderr)
        return 2
    say(f"text: {source}, {len(text) / 1e6:.1f} MB, {HELD_OUT:.0%} of it held out")
    dense, sparse = make_models(scale, device)
    say(_describe(scale, dense, sparse, device))
    explanation = explain_model(scale, device)
    say("backend " + summarize(explanation).replace("\n", "\n  "))
    models = {"dense": dense, "nsa": sparse}
    seconds = scale.seconds if args.seconds is None else args.seconds
    # A run of so many steps is to be repeated exactly, which the number of threads would change.
    with nullcontext() if args.steps is not None else faster_threads(models, data):
        curves = train(models, data, scale, steps=args.steps, seconds=seconds)
        bits = {name: data.bits_per_byte(model) for name, model in models.items()}
        prompt, written, speed = _write(sparse, data)
    ratio = bits["nsa"] / bits["dense"]
    verdict = "within" if ratio <= TOLERANCE else "NOT within"
    losses = ", ".join(f"{name} {_smooth(all)[-1]:.3f}" for name, all in curves.losses.items())
    say(
        f"trained {curves.steps} steps in {curves.seconds:.0f} s; training loss: {losses}\n"
        f"held-out bits per byte: dense {bits['dense']:.4f}, NSA {bits['nsa']:.4f}, ratio "
        f"{ratio:.4f}: NSA is {verdict} {TOLERANCE - 1:.0%} of dense\n"
        f"\nAfter this:\n{_quote(prompt[-200:])}\nNSA writes, {speed:.0f} bytes/s through its "
        f"cache:\n{_quote(written)}"
    )
    if args.out is not None:
        save_curves(curves, bits, args.out)
        say(f"\nsaved the curves as {args.out}")
    if args.json:
        result = {
            "text": source,
            "device": str(device),
            "backends": explanation.backends,
            "steps": curves.steps,
            "seconds": curves.seconds,
            "loss": curves.losses,
            "held_out_bits_per_byte": bits,
            "ratio": ratio,
            "within_tolerance": ratio <= TOLERANCE,
            "prompt": prompt,
            "written": written,
            "bytes_per_second": speed,
        }
        print(json.dumps(result))
    return 0


# --------------------------------------------------------------------------- text


def read_text(file: Path | None) -> tuple[str, bytes]:
    """What to call the text, and its bytes.

    Raises:
        OSError: the file cannot be read.
        ValueError: there are no sources of the standard library here.
    """
    if file is not None:
        return str(file), file.read_bytes()
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [path for path in sorted(root.rglob("*.py")) if not skipped & {*path.parts}]
    if not files:
        raise ValueError(f"no Python sources in {root}: name a FILE to learn from")
    random.Random(_SEED).shuffle(files)  # the held-out part shall be like the rest
    return f"Python's own sources ({root})", b"\n".join(path.read_bytes() for path in files)


class Data:
    """Training batches and held-out sequences of one text, on a device."""

    def __init__(self, text: bytes, scale: Scale, device: torch.device) -> None:
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        split = int(len(tokens) * (1 - HELD_OUT))
        span = scale.length + 1
        held_out, self.training = tokens[split:], tokens[:split]
        if len(held_out) < 2 * span:
            raise ValueError(
                f"the text has {len(text)} bytes, the demo needs at least "
                f"{math.ceil(2 * span / HELD_OUT)}"
            )
        self.scale, self.device = scale, device
        count = min(scale.held_out, len(held_out) // span)
        starts = torch.linspace(0, len(held_out) - span, count).long()
        self.held_out = self._cut(held_out, starts)
        self._generator = torch.Generator().manual_seed(_SEED)

    def batch(self) -> Tensor:
        """The next training batch, `[batch, length + 1]`."""
        most = len(self.training) - self.scale.length
        starts = torch.randint(most, (self.scale.batch,), generator=self._generator)
        return self._cut(self.training, starts)

    @torch.no_grad()
    def bits_per_byte(self, model: ByteLanguageModel) -> float:
        """The model's mean cross entropy on the held-out sequences, in bits."""
        losses = []
        for batch in self.held_out.split(self.scale.batch):
            with self.precision():
                losses.append(model.loss(batch) * len(batch))
        return float(torch.stack(losses).sum()) / len(self.held_out) / math.log(2)

    def precision(self) -> AbstractContextManager:
        """Where both models compute."""
        if self.scale.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.scale.dtype)

    def _cut(self, tokens: Tensor, starts: Tensor) -> Tensor:
        index = starts[:, None] + torch.arange(self.scale.length + 1)
        return tokens[index].to(self.device, torch.long)


# --------------------------------------------------------------------------- models


def make_models(scale: Scale, device: torch.device) -> tuple[ByteLanguageModel, ByteLanguageModel]:
    """The dense and the NSA model, equal in every parameter that both have in the same shape."""
    torch.manual_seed(_SEED)
    dense = ByteLanguageModel(scale.size, None)
    sparse = ByteLanguageModel(scale.size, scale.config)
    own = sparse.state_dict()
    common = {k: v for k, v in dense.state_dict().items() if k in own and own[k].shape == v.shape}
    sparse.load_state_dict(common, strict=False)
    return dense.to(device), sparse.to(device)


def explain_model(scale: Scale, device: torch.device) -> Explanation:
    """Which backend the NSA model's attention takes in training, and why."""
    size, config = scale.size, scale.config

    def tensor(rows: int, heads: int, dim: int) -> Tensor:
        shape = (scale.batch, rows, heads, dim)
        return torch.empty(shape, device=device, dtype=scale.dtype, requires_grad=True)

    raw = tensor(scale.length, size.num_kv_heads, size.head_dim)
    compressed = tensor(config.num_compressed(scale.length), size.num_kv_heads, size.head_dim)
    q = tensor(scale.length, size.num_heads, size.head_dim)
    gates = tensor(scale.length, size.num_heads, 3)
    return explain(q, compressed, compressed, raw, raw, raw, raw, gates, config)


def summarize(explanation: Explanation) -> str:
    """Each answer once, with the operators it holds for."""
    answers: dict[str, list[str]] = {}
    for choice in explanation:
        chosen = choice.backend.name if choice.backend else "none"
        lines = [f"{chosen}{' (forced)' if choice.forced else ''}"]
        for name, reasons in choice.rejected:
            lines += [f"not {name}: {reason}" for reason in reasons]
        answers.setdefault("\n".join(lines), []).append(choice.operator)
    if len(answers) == 1:
        return next(iter(answers))
    return "\n".join(f"{', '.join(names)}: {answer}" for answer, names in answers.items())


def _describe(scale: Scale, dense: nn.Module, sparse: nn.Module, device: torch.device) -> str:
    size, config = scale.size, scale.config
    counts = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (dense, sparse)]
    seen = (
        config.num_selected * config.select_block_size
        + config.window_size
        + config.num_compressed(scale.length)
    )
    return (
        f"model: {size.layers} layers of {size.hidden_size} channels, {size.num_heads} heads, "
        f"{size.num_kv_heads} key/value heads, on {device} in {str(scale.dtype)[6:]}; "
        f"dense {counts[0]:.2f} M parameters, NSA {counts[1]:.2f} M\n"
        f"batches: {scale.batch} sequences of {scale.length} bytes, of which an NSA query reads "
        f"at most {seen} keys"
    )


# --------------------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class Curves:
    """The training loss of each model at each step, in nats per byte."""

    losses: dict[str, list[float]]
    seconds: float

    @property
    def steps(self) -> int:
        return len(next(iter(self.losses.values())))


def train(
    models: dict[str, ByteLanguageModel],
    data: Data,
    scale: Scale,
    *,
    steps: int | None,
    seconds: float,
) -> Curves:
    """Train the models side by side on the same batches, for so many steps or seconds.

    The learning rate follows the share of the run that is over, so that the schedule ends with the
    run however fast the machine turns out to be.
    """
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
        for name, model in models.items()
    }
    losses: dict[str, list[float]] = {name: [] for name in models}
    with Progress() as progress:
        _trial(models, data)
        start = time.monotonic()
        for done in _shares(steps, scale.steps, seconds):
            batch = data.batch()
            for name, model in models.items():
                for group in optimizers[name].param_groups:
                    group["lr"] = scale.learning_rate * _schedule(done)
                losses[name].append(_step(model, optimizers[name], data, batch))
            progress.show(done, {name: values[-1] for name, values in losses.items()})
        elapsed = time.monotonic() - start
        progress.show(1.0, {name: values[-1] for name, values in losses.items()})
    return Curves(losses, elapsed)


def _step(
    model: ByteLanguageModel, optimizer: torch.optim.Optimizer, data: Data, batch: Tensor
) -> float:
    with data.precision():
        loss = model.loss(batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


@contextmanager
def faster_threads(models: dict[str, ByteLanguageModel], data: Data) -> Iterator[None]:
    """On a CPU, use one thread inside the block where that is faster than torch's many.

    A team of threads waits for its last member, which on a busy machine waits for other programs.
    """
    before = torch.get_num_threads()
    if data.device.type == "cpu" and before > 1:
        _trial(models, data)
        many = _trial(models, data)
        torch.set_num_threads(1)
        if _trial(models, data) > many:
            torch.set_num_threads(before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _trial(models: dict[str, ByteLanguageModel], data: Data) -> float:
    """Run each model once forward and backward, so that kernels compile; how long it took."""
    start = time.monotonic()
    for model in models.values():
        with data.precision():
            loss = model.loss(data.held_out[: data.scale.batch])
        loss.backward()
        model.zero_grad(set_to_none=True)
    return time.monotonic() - start


def _shares(steps: int | None, most: int, seconds: float) -> Iterator[float]:
    """Before each step, the share of the run that is over."""
    if steps is not None:
        yield from (step / steps for step in range(steps))
        return
    start = time.monotonic()
    for step in range(most):
        share = max(step / most, (time.monotonic() - start) / seconds)
        if share >= 1:
            return
        yield share


def _schedule(done: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine to a tenth."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * done)
    return min(1.0, 20 * done + 0.01) * cosine


class Progress:
    """A progress bar on stderr: tqdm's where it is installed, else a line per tenth."""

    def __enter__(self) -> Progress:
        self._bar = None
        self._tenth = 0
        if importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            layout = "{l_bar}{bar}| {elapsed}{postfix}"
            self._bar = tqdm(total=100, desc="training", bar_format=layout, file=sys.stderr)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: float, losses: dict[str, float]) -> None:
        """Say what share is over and the latest losses."""
        text = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(round(100 * done, 1) - self._bar.n)
        elif done * 10 >= self._tenth:
            print(f"training {done:4.0%}  {text}", file=sys.stderr, flush=True)
            self._tenth = math.floor(done * 10) + 1


# --------------------------------------------------------------------------- results


def _write(model: ByteLanguageModel, data: Data) -> tuple[str, str, float]:
    """What NSA writes after the start of a held-out sequence: prompt, text, bytes per second."""
    length = data.scale.length // 2
    prompt = data.held_out[:1, :length]
    generator = torch.Generator(data.device).manual_seed(_SEED)
    with data.precision():
        model.generate(prompt, 2, 0.8, generator)  # compiles what decoding needs
        start = time.monotonic()
        written = model.generate(prompt, min(length, 256), 0.8, generator).tolist()
    speed = len(written[0]) / (time.monotonic() - start)
    given, text = (
        bytes(part[0]).decode("utf-8", errors="replace") for part in (prompt.tolist(), written)
    )
    return given, text, speed


def require_matplotlib() -> None:
    """Raise before the training rather than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(
            "--out draws with matplotlib, which is not installed: pip install 'nsa-port[demo]'"
        )


def save_curves(curves: Curves, bits: dict[str, float], file: Path) -> None:
    """Draw the training losses in bits per byte, smoothed, and where each model ended."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, losses in curves.losses.items():
        label = f"{name}: {bits[name]:.4f} held out"
        (line,) = axes.plot([loss / math.log(2) for loss in _smooth(losses)], label=label)
        axes.axhline(bits[name], color=line.get_color(), linestyle=":")
    axes.set(xlabel="step", ylabel="bits per byte", title="NSA next to dense attention")
    axes.legend()
    figure.savefig(file, dpi=150)


def _smooth(values: list[float]) -> list[float]:
    """Exponential moving averages, each with the weights it has so far."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = 0.9 * total + value, 0.9 * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _quote(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.splitlines())


def _say_nothing(_: str) -> None:
    """For `--json`, whose output is JSON and nothing else."""
