"""`neuroweave`: the list of commands, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback

import click

from neuroweave import __version__

# command: (module in neuroweave.cli, what --help of the whole program says). Read without importing the module.
COMMANDS = {
    "import": ("import_", "Turn a GGUF file, a folder or a hub id into a Hugging Face checkpoint."),
    "export": ("export", "Write a checkpoint as a GGUF file, for llama.cpp."),
    "inspect": ("inspect_", "Show what a checkpoint is, from its headers alone."),
    "neuroblast": ("neuroblast", "Make a NeuroBLAST model, or convert a published one."),
    "patch": ("patch", "Swap or learn activation functions; write a checkpoint that loads anywhere."),
    "neurons": ("neurons", "Collect neurons in a bank: extract from a model, define, derive, show."),
    "deltas": ("deltas", "Generate sign-symmetric delta weights for a model from a bank."),
    "fuse": ("fuse", "Fuse deltas into a checkpoint of any size; --dry-run says what would happen."),
    "verify": ("verify", "Check a checkpoint: index, shapes, finite values, hashes."),
    "diff": ("diff", "Compare two checkpoints tensor by tensor."),
    "extract-delta": ("extract_delta", "Write the delta that turns one checkpoint into another."),
    "recipe": ("recipe", "Show what was done to a model, or do it again to the same bytes."),
    "generate": ("generate", "Continue a prompt with any checkpoint, streaming to the terminal."),
    "chat": ("chat", "Talk with a model; answers from your documents or a live search, with sources."),
    "ask": ("ask", "One question, answered from what a search finds; --json for programs."),
    "index": ("index", "Build or refresh the index of a folder of documents, for --search local:."),
    "serve": ("serve", "Serve a model to OpenAI's clients, with a page to chat at."),
    "bench": ("bench", "Measure how fast a model decodes, way by way, beside what memory allows."),
    "audit": ("audit", "List every nonlinearity that a forward pass really runs."),
    "compare": ("compare", "Measure what a change did to a model; write a report."),
    "sweep": ("sweep", "Measure a grid of changes; draw what each costs."),
    "round": ("round_", "Round a model's weights to 4 bits so that what it computes changes least."),
    "harden": ("harden", "Turn learned mixtures into segments: a plain recipe."),
    "calibrate": ("calibrate", "Bring a patched model back in closed form: minutes on a CPU."),
    "heal": ("heal", "Bring a patched model back by distillation: LoRA, MLPs, mixtures or all of it."),
    "train": ("train", "Train NeuroBLAST or any model as a YAML file says; resumes with the next sample."),
    "tokenizer": ("tokenizer", "Train a tokenizer in every format, or add tokens to a model."),
    "sensitivity": ("sensitivity", "Change one layer at a time; rank the layers."),
}


class LazyCommands(click.Group):
    """A group whose commands are imported when they are called, so that `--help` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"neuroweave.cli.{COMMANDS[cmd_name][0]}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise click.UsageError(f"There is no command {args[0]!r}.{hint} See neuroweave --help.")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(
    cls=LazyCommands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Change the neurons of a language model and know what the change did.",
    epilog="Each command explains itself: neuroweave COMMAND --help",
)
@click.version_option(__version__, prog_name="neuroweave")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def program(ctx: click.Context, debug: bool) -> None:
    ctx.obj = {"debug": debug}


def main(arguments: list[str] | None = None) -> None:
    """Run the program: exit 0 when done, 1 when a check said no, 2 on bad input, 130 on Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    if debug:  # accepted anywhere on the line
        arguments = ["--debug", *(word for word in arguments if word != "--debug")]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        sys.exit(program.main(args=arguments, prog_name="neuroweave", standalone_mode=False) or 0)
    except click.exceptions.Exit as exit_:
        sys.exit(exit_.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:  # click makes an Abort of a KeyboardInterrupt
        hint = str(stop.__cause__ or "") if isinstance(stop, click.Abort) else str(stop)
        fail(f"stopped; {hint}" if hint else "stopped", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        if debug:
            traceback.print_exc()
        fail(one_line(error.format_message()), 2)
    except (ValueError, OSError, ImportError, NotImplementedError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        fail(one_line(str(error) or type(error).__name__), 2)
    except Exception as error:  # a defect of ours: say so, keep it to one line, offer the traceback
        if debug:
            traceback.print_exc()
        fail(f"unexpected {type(error).__name__}: {one_line(str(error))} (--debug shows where)", 2)


def one_line(text: str) -> str:
    return " ".join(text.split())


def fail(message: str, code: int) -> None:
    click.echo(f"neuroweave: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
