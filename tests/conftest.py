"""Small real models and contexts for the tests. Nothing is mocked and nothing is downloaded."""

import functools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' own source, without a GPU

import pytest

from hostile import good, place  # noqa: F401

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz =+,"


def make_model(
    seed=0, *, hidden=32, layers=2, dtype="float32", extra_rows=0, tied=True, alphabet=ALPHABET
):
    """A random Qwen3 with a character tokenizer; ``extra_rows`` pads its vocabulary."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from opdctl.models.from_nothing import new_tokenizer
    from opdctl.models.model import Model

    torch.set_num_threads(1)
    tokenizer = new_tokenizer([alphabet])
    config = Qwen3Config(
        vocab_size=len(tokenizer) + extra_rows,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        tie_word_embeddings=tied,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    net = Qwen3ForCausalLM(config).to(getattr(torch, dtype))
    with torch.no_grad():  # a random model is nearly uniform: sharpen it
        for name, parameter in net.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0 if "embed" not in name else 3.0)
    return Model(net.train(False), tokenizer, f"random {seed}")


@pytest.fixture
def model():
    return make_model()


def make_model64(seed=0, width=24, layers=2):
    """A GPT-2 in float64 throughout: Qwen3's norms and rotations are fp32 whatever its type."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from opdctl.models.from_nothing import new_tokenizer
    from opdctl.models.model import Model

    torch.set_num_threads(1)
    tokenizer = new_tokenizer([ALPHABET])
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    net = GPT2LMHeadModel(config).to(torch.float64)
    return Model(net.train(False), tokenizer, f"random gpt2 {seed}")


@pytest.fixture
def float64():
    """float64 is torch's default, as in a stage of that type."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def model64(float64):
    return make_model64()


@pytest.fixture(scope="session")
def on_disk(tmp_path_factory):
    """A folder: models s (a student), t and u (teachers) of one tokenizer, s64 and t64 in float64;
    prompts in sums.jsonl, with a short and a long answer."""
    from one_step import write

    folder = tmp_path_factory.mktemp("on_disk")
    models = {name: make_model(seed) for seed, name in enumerate("stu")}
    write(folder, models | {"s64": make_model64(0), "t64": make_model64(5)})
    return folder


@pytest.fixture
def stage(on_disk, tmp_path):
    """``one_step.opd`` on these models."""
    from one_step import opd

    return functools.partial(opd, on_disk, tmp_path)


def files_of(folder):
    """Content of what a run directory records, by path; locks and logs apart."""
    kept = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p): p.read_bytes() for p in kept if "logs" not in p.relative_to(folder).parts}


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """An uninterrupted run of the demo recipe: (folder, what the command printed)."""
    from running import DEMO, inside

    folder = tmp_path_factory.mktemp("runs") / "demo"
    done = inside("run", DEMO, "--out", folder)
    assert done.returncode == 0, done.stderr
    before = files_of(folder)
    yield folder, done
    assert files_of(folder) == before, "a test wrote into the run that others start from"
