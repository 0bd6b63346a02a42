"""The command line: ``fastattn info | demo | train | generate | bench | verify | maps``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import fastattn
from fastattn.errors import UnsupportedError

# Mistakes of the user and of the installation: one line says what is wrong, and a traceback would hide it.
_USER_ERRORS = (ValueError, TypeError, OSError, ModuleNotFoundError, UnsupportedError)
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: its arguments; by default those of the process.

    Returns:
        The exit status: 0 for success, 1 where a check failed, 2 for a mistake in the call, 130 for Ctrl-C.
    """
    args = parser().parse_args(argv)
    shown = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        if getattr(args, "threads", None) is not None and args.command != "train":
            torch.set_num_threads(args.threads)
        return args.run(args)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, `head` perhaps, has seen enough; Python's own flush at exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except _USER_ERRORS as error:
        print(f"fastattn {args.command}: {error}", file=sys.stderr)
        return 2
    finally:
        warnings.showwarning = shown


def parser() -> argparse.ArgumentParser:
    """Returns the parser of every command."""
    top = argparse.ArgumentParser(
        prog="fastattn", description="Fused, exact attention for PyTorch.", epilog="fastattn COMMAND --help says more."
    )
    top.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        command.set_defaults(run=run)
        return command

    add("info", _info, "versions, processor, and which backends can run here")

    demo = add("demo", _demo, "pronounce words, draw what the model looked at, and compare with stock PyTorch")
    demo.add_argument(
        "words", nargs="*", metavar="WORD", help="English words; by default ten that it was not trained on"
    )
    demo.add_argument("--out", type=Path, default=Path("fastattn-demo"), help="folder for the pictures (%(default)s)")
    _add_threads(demo)

    train = add("train", _train, "train a model")
    from fastattn.tools import train as training

    training.add_arguments(train)

    generate = add("generate", _generate, "text in, text out, with a trained model")
    generate.add_argument("texts", nargs="*", metavar="TEXT", help="sources; by default the lines of standard input")
    _add_model(generate)
    generate.add_argument("--strategy", choices=["greedy", "beam", "sample"], default="greedy", help="(%(default)s)")
    generate.add_argument("--num-beams", type=int, help="beams of --strategy beam (4)")
    generate.add_argument("--temperature", type=float, help="of --strategy sample (1.0)")
    generate.add_argument("--top-k", type=int, help="sample among the likeliest so many")
    generate.add_argument("--top-p", type=float, help="sample among the likeliest of this total probability")
    generate.add_argument("--max-new-tokens", type=int, help="the most tokens to produce")
    generate.add_argument("--seed", type=int, help="of --strategy sample")
    _add_threads(generate)

    bench = add("bench", _bench, "time fastattn beside its peers, after checking every answer")
    bench.add_argument(
        "families",
        nargs="*",
        metavar="FAMILY",
        help="attention, decode, packed, paged, softmax, feed_forward, linear_cross_entropy, rotary, embedding, "
        "module, model, overhead, threads, scaling, or all (default)",
    )
    bench.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    bench.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32"])
    bench.add_argument(
        "--backends", nargs="+", metavar="NAME", help="ours to time side by side; auto is each call's own choice (auto)"
    )
    bench.add_argument(
        "--peers",
        nargs="*",
        metavar="NAME",
        help="only these, or none, e.g. 'torch SDPA'; by default all that are here",
    )
    bench.add_argument("--quick", action="store_true", help="fewer rounds, and no row that takes long")
    bench.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows of the grid")
    bench.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for results.jsonl (appended to), report.html and its plots"
    )
    _add_threads(bench)

    verify = add("verify", _verify, "check every answer and gradient against float64, beside eager PyTorch")
    verify.add_argument(
        "what",
        nargs="?",
        choices=["ops", "model", "all"],
        default="all",
        help="ops, a whole model, or both (%(default)s)",
    )
    verify.add_argument("--op", nargs="+", dest="ops", metavar="NAME", help="only these ops")
    verify.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16", "float16"], help="only these dtypes")
    verify.add_argument("--backend", help="the backend to check; by default each call's automatic choice")
    verify.add_argument("--failures", action="store_true", help="show only the rows that fail")
    _add_model(verify)
    _add_threads(verify)

    maps = add("maps", _maps, "write the attention maps of a text as a page or a picture")
    maps.add_argument("text", metavar="TEXT", help="the source")
    maps.add_argument("--out", type=Path, default=Path("maps.html"), help=".html, or .png, .svg, .pdf (%(default)s)")
    maps.add_argument("--layers", nargs="+", metavar="PATTERN", help="only these layers of a picture")
    _add_model(maps)
    _add_threads(maps)
    return top


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", type=Path, metavar="FOLDER", help="what save_pretrained wrote; by default the shipped g2p model"
    )


def _add_threads(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=_positive, help="CPU threads (PyTorch's choice)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _load(folder: Path | None):
    from fastattn.models import Seq2Seq, g2p

    return g2p.load_model() if folder is None else Seq2Seq.from_pretrained(folder)


def _info(args: argparse.Namespace) -> int:
    from fastattn.tools import info

    print(info.report())
    return 0


def _demo(args: argparse.Namespace) -> int:
    from fastattn.tools import demo

    return demo.run(args.words, args.out)


def _train(args: argparse.Namespace) -> int:
    from fastattn.tools import train

    return train.main(args)


def _generate(args: argparse.Namespace) -> int:
    model = _load(args.model)
    texts = args.texts or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise ValueError("nothing to generate from: give texts, or lines on standard input")
    settings = {
        name: getattr(args, name)
        for name in ("num_beams", "temperature", "top_k", "top_p", "max_new_tokens")
        if getattr(args, name) is not None
    }
    if args.seed is not None:
        settings["generator"] = torch.Generator().manual_seed(args.seed)
    for text in model.generate(texts, strategy=args.strategy, **settings):
        print(text)
    return 0


def _bench(args: argparse.Namespace) -> int:
    from fastattn.tools.bench import runner

    return runner.run(
        args.families,
        names=args.rows,
        dtypes=[getattr(torch, d) for d in args.dtype],
        device=args.device,
        backends=args.backends,
        peer_names=args.peers,
        quick=args.quick,
        out=args.out,
    )


def _verify(args: argparse.Namespace) -> int:
    from fastattn.tools import verify_cli

    return verify_cli.run(args.what, args.ops, args.dtype, args.backend, args.failures, lambda: _load(args.model))


def _maps(args: argparse.Namespace) -> int:
    from fastattn.tools import seq2seq_maps

    maps, labels, target = seq2seq_maps.record(_load(args.model), args.text)
    title = f"{args.text} \u2192 {target}"
    if args.out.suffix in (".html", ".htm"):
        path = maps.save_html(args.out, labels=labels, title=title)
    else:
        path = maps.save_png(args.out, labels=labels, title=title, layers=args.layers)
    print(f"{title}\n{path}")
    return 0


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Prints a warning as one line: where in the library it was issued is of no use on a command line."""
    print(f"note: {message}", file=sys.stderr)
