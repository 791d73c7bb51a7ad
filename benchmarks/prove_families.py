"""Which sites can be patched in which family: tiny random models of every decoder family that really ran.

    python benchmarks/prove_families.py [--write docs/families.md] [FAMILY ...]

For every family and site: patch with `phantom`, see the logits change and every new activation called, run backward,
save, reload with AutoModelForCausalLM, compare the logits, undo, compare with the original bit for bit. For the MLP
also: a learned mixture, and the patch made on disk. A cell says yes only when all of that held.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from neuroweave import Recipe, patch, patch_checkpoint
from neuroweave.activations.torch import Activation
from neuroweave.surgery.recipe import SITES
from neuroweave.surgery.sites import find_sites

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import families

# long enough for every expert to be chosen; Reformer trains on whole chunks only, xLSTM's plain path on one chunk only
LENGTHS = {"reformer": 64, "xlstm": 7}
QKV = ("attention.q", "attention.k", "attention.v")
MIXTURE = {"mixture": ["original", "relu", "swish_beta"]}


def logits(model: PreTrainedModel, family: str) -> torch.Tensor:
    torch.manual_seed(0)
    return model(**families.tiny_inputs(family, length=LENGTHS.get(family, 24))).logits


def prove(family: str, site: str) -> str:
    """What happened: `yes`, or what went wrong in a few words."""
    model = families.tiny_model(family)
    places = find_sites(model)
    if site not in places:
        return "-"
    if any(not place.op for place in places[site]):
        return "part"
    sites = list(QKV) if places[site][0].shared else [site]
    recipe = Recipe.parse({"sites": [{"site": sites, "activation": "phantom"}]})
    with torch.no_grad():
        before = logits(model, family)
    handle = patch(model, recipe)
    calls = count_calls(model)
    after = logits(model.train(family == "reformer"), family)  # which checks that it trains in training mode
    if torch.equal(before, after):
        return "no effect"
    if not torch.isfinite(after).all():
        return "not finite"
    if silent := [name for name, count in calls.items() if count == 0]:
        return f"{len(silent)} of {len(calls)} never called"
    after.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if not gradients or not all(torch.isfinite(gradient).all() for gradient in gradients):
        return "no gradient"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        with torch.no_grad():
            if not torch.allclose(logits(again, family), after, atol=1e-6):
                return "reload differs"
    handle.undo()
    model.eval()
    with torch.no_grad():
        if not torch.equal(logits(model, family), before):
            return "undo differs"
    return prove_mlp(family) if site == "mlp" else "yes"


def prove_mlp(family: str) -> str:
    """The same for what an MLP alone can have: a learned mixture, and a patch made on disk."""
    model = families.tiny_model(family)
    places = find_sites(model)["mlp"]
    plain = all(place.neurons and not own_weights(model, place.path) for place in places)
    activation = MIXTURE if plain else "relu|silu"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/original")
        recipe = {"sites": [{"site": "mlp", "activation": activation}]}
        patch_checkpoint(f"{folder}/original", f"{folder}/patched", recipe)
        patch(model, recipe)
        again = AutoModelForCausalLM.from_pretrained(f"{folder}/patched", attn_implementation="eager").eval()
        with torch.no_grad():
            if not torch.allclose(logits(again, family), logits(model, family), atol=1e-6):
                return "disk differs"
        try:
            type(model).__mro__[2].from_pretrained(f"{folder}/patched")
        except Exception:  # as it should: the family's own class does not know the activation
            return "yes" if activation is MIXTURE else "yes, no mixture"
    return "yes, own class loads it unpatched"


def own_weights(model: PreTrainedModel, path: str) -> bool:
    activation = model.get_submodule(path.rpartition(".")[0])
    activation = getattr(activation, path.rpartition(".")[2])
    return isinstance(activation, torch.nn.Module) and bool(activation.state_dict())


def count_calls(model: PreTrainedModel) -> dict[str, int]:
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, Activation):
            calls[name] = 0
            module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    return calls


def row(family: str, sites: tuple[str, ...]) -> list[str]:
    cells = []
    for site in sites:
        try:
            cells.append(prove(family, site))
        except Exception as error:
            cells.append(f"{type(error).__name__}: {' '.join(str(error).split())[:60]}")
    return cells


def page(rows: dict[str, list[str]]) -> str:
    good = sum(cells[0].startswith("yes") for cells in rows.values())
    lines = [
        "# Decoder families and their sites",
        "",
        "Made by `python benchmarks/prove_families.py --write docs/families.md`: do not edit.",
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, CPU, float32.",
        "",
        f"**The MLP site works in {good} of {len(rows)} decoder families.** Each `yes` is a tiny random model that was "
        "patched, ran forward (every new activation was called) and backward, was saved and reloaded with equal logits "
        "and came back bit-equal on undo; for the MLP also with a learned mixture and with the patch made on disk. "
        "`-`: the family has no such place. `part`: an MLP in it computes its activation inside its own code, so the "
        "site is refused there (other layers can be chosen with `layers`).",
        "",
        "| family | " + " | ".join(SITES) + " |",
        "|---" * (len(SITES) + 1) + "|",
    ]
    lines += [f"| {family} | " + " | ".join(cells) + " |" for family, cells in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--sites", nargs="*", default=list(SITES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = {}
    for family in tqdm(arguments.families or families.DECODER_FAMILIES, disable=None):
        rows[family] = row(family, tuple(arguments.sites))
        if not arguments.write:
            print(f"{family:24}", " | ".join(rows[family]), flush=True)
    if arguments.write:
        arguments.write.write_text(page(rows), encoding="utf-8")
    print(f"MLP site: {sum(cells[0].startswith('yes') for cells in rows.values())} of {len(rows)}")


if __name__ == "__main__":
    main()
