"""A trace reproduces its model, leaves it alone, or says why not."""

import copy
import dataclasses
import functools
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fxzip.errors import InputError, TraceError
from fxzip.tracing import check_placement, difference, quiet_execution, run_eager, run_recorded, trace
from fxzip.tracing import ladder as ladder_module
from fxzip.tracing.calls import as_call, with_batch

SYMBOLIC, VALUES, EXPORT = ladder_module.RUNGS
IMAGE = torch.randn(2, 3, 32, 32)


def reproduces(program, model, sample, sizes=(1, 2, 5)):
    model = copy.deepcopy(model).eval()
    for size in sizes:
        call = with_batch(as_call(sample), size, torch.Generator().manual_seed(size))
        expected = run_eager(model, call)
        assert difference(run_recorded(program.module, call).output, expected) is None
        assert difference(run_eager(program.module, call), expected) is None


def says(text):
    return re.escape(text)


@pytest.mark.parametrize("build", ["resnet18", "densenet121", "googlenet", "shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_torchvision(build):
    options = {"init_weights": False} if build == "googlenet" else {}
    model = getattr(torchvision.models, build)(num_classes=5, **options)
    program = trace(model, IMAGE)
    assert program.rung == SYMBOLIC
    assert not program.failures
    assert not program.mutators
    reproduces(program, model, IMAGE, (1, 3))


def test_vision_transformer():
    model = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)
    nn.init.normal_(model.heads.head.weight)
    program = trace(model, IMAGE[:1])
    reproduces(program, model, IMAGE)
    assert program.shapes["encoder_layers_encoder_layer_0_mlp_0"] == (2, 17, 32)  # a single input is looked at twice
    assert program.batch_axes["encoder_layers_encoder_layer_0_mlp_0"] == (0,)


class DynamicView(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 30 * 30, 3)

    def forward(self, x):
        x = self.conv(x)
        return self.head(x.view(x.size(0), -1))


class Loop(nn.Module):
    """A loop over a size, a factory with a size, a condition on a size."""

    def __init__(self):
        super().__init__()
        self.cell = nn.Linear(8, 4)

    def forward(self, x):
        b, t, c = x.shape
        state = torch.zeros(b, 4)
        assert c == 4
        for step in range(t):
            state = torch.tanh(self.cell(torch.cat([x[:, step], state], dim=1)))
        if x.shape[-1] > 8:
            return state * 2
        for row in x.unbind(1):
            state = state + row * len(x.shape)
        return state


class SetItem(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        y[:, 0] = 1.0
        return y * 2


ENCODER = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)


@pytest.mark.parametrize(
    ("model", "sample", "rung"),
    [
        (nn.Linear(3, 4), torch.randn(2, 3), SYMBOLIC),
        (DynamicView(), IMAGE, SYMBOLIC),
        (Loop(), torch.randn(2, 5, 4), VALUES),
        (SetItem(), torch.randn(2, 4), VALUES),
        (ENCODER, torch.randn(2, 5, 8), VALUES),
    ],
)
def test_rungs(model, sample, rung):
    program = trace(model, sample)
    assert program.rung == rung
    assert len(program.failures) == ladder_module.RUNGS.index(rung)
    assert all(reason.endswith(".") for reason in program.failures)
    reproduces(program, model, sample)


def test_batch_of_one_works_like_any_other():
    for model, sample in [(DynamicView(), IMAGE[:1]), (Loop(), torch.randn(1, 5, 4))]:
        reproduces(trace(model, sample), model, sample)


def test_setitem_is_a_mutator():
    program = trace(SetItem(), torch.randn(2, 4))
    assert program.mutators == {"setitem"}


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


class Ports(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.a, self.b = form, nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, x, y, *, scale=None, shift=0.5):
        left, right = self.a(x) + self.b(y), self.a(x) * self.b(y) + shift
        if scale is not None:
            left = left * scale["by"]
        if self.form == "pair":
            return Pair(left, right)
        return {"tuple": (left, [right]), "dict": {"left": left, "size": 3}}[self.form]


@pytest.mark.parametrize("form", ["tuple", "dict", "pair"])
@pytest.mark.parametrize("rungs", [(SYMBOLIC,), (VALUES,), (EXPORT,)])
def test_inputs_and_outputs(form, rungs, monkeypatch):
    monkeypatch.setattr(ladder_module, "RUNGS", rungs)
    x, y = torch.randn(2, 3), torch.randn(2, 5)
    for sample in [(x, y), {"y": y, "x": x}, {"scale": {"by": x[:, :1]}, "y": y, "x": x, "shift": 2.0}]:
        model = Ports(form)
        program = trace(model, sample)
        reproduces(program, model, sample)
        names = [node.target for node in program.module.graph.nodes if node.op == "placeholder"]
        assert names[:2] == ["x", "y"]


class Content(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(x) * 2


def test_condition_on_content_is_an_error():
    message = (
        r"`net` must be traceable; no way of tracing reproduces it\. Symbolic tracing failed at test_tracing.py:\d+: "
        r".*control flow\. Symbolic tracing with example values failed at test_tracing.py:\d+: DataDependentError: "
        r"`bool` of `gt` depends on the content of a tensor\. `torch.export` failed.* Replace conditions on the "
        r"content of tensors by tensor operations such as `torch.where`"
    )
    with pytest.raises(TraceError, match=message):
        trace(Content(), torch.randn(2, 3), name="net")


class Item(Content):
    def forward(self, x):
        return self.fc(x) * range(3)[int(x.sum().item() > 1e9)]


def test_number_out_of_a_tensor_is_not_taken_for_a_size():
    with pytest.raises(TraceError, match="`int` of `gt` depends on the content of a tensor"):
        trace(Item(), torch.randn(2, 3))


class FixedBatch(Content):
    def forward(self, x):
        return self.fc(x).view(2, 3)


class SampleOnly(Content):
    """Numbers of the batch go through a Python int: right for the sample alone, in every rung but the last."""

    def forward(self, x):
        return self.fc(x) * float(int(x.shape[0]))


def test_a_model_for_one_batch_size_is_taken_as_it_is():
    program = trace(FixedBatch(), torch.randn(2, 3))
    assert program.batch_axes == {}
    assert program.shapes["fc"] == (2, 3)


def test_right_on_the_sample_only(monkeypatch):
    monkeypatch.setattr(ladder_module, "RUNGS", (SYMBOLIC, VALUES))
    message = (
        r"must be traceable at every batch size; it was at that of `sample_input` only\. .* gave another result than "
        r"the model: it reproduces `sample_input`, with its batch of 2, but on a batch of 3 it raised "
        r"SpecializationError: `int` of `getitem` at test_tracing\.py:201 must give what it gave when the network was "
        r"traced, 2; it gives 3 now"
    )
    with pytest.raises(TraceError, match=message):
        trace(SampleOnly(), torch.randn(2, 3))


class PlainTensor(Content):
    """A tensor that is no buffer meets a size: torch asks the size for its value, and no graph sees it."""

    def __init__(self):
        super().__init__()
        self.plain = torch.ones(1, 3)

    def forward(self, x):
        return self.fc(x) + self.plain.expand(x.shape[0], 3).cumsum(0)


def test_export_is_the_last_resort():
    model = PlainTensor()
    program = trace(model, torch.randn(2, 3))
    assert program.rung == EXPORT
    reproduces(program, model, torch.randn(2, 3), (2, 5))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.embed.weight.requires_grad_(False)
        self.register_buffer("shift", torch.randn(4))
        self.register_buffer("scale", torch.randn(4), persistent=False)

    def forward(self, ids):
        x = self.mid(self.embed(ids) + self.shift) * self.scale
        return self.head(self.mid(x))


@pytest.mark.parametrize("rung", [SYMBOLIC, VALUES, EXPORT])
def test_tied_weights_modules_called_twice_and_buffers(rung, monkeypatch):
    monkeypatch.setattr(ladder_module, "RUNGS", (rung,))
    model, ids = Tied(), torch.randint(0, 9, (2, 5))
    program = trace(model, ids)
    reproduces(program, model, ids)
    own = dict(program.module.named_parameters(remove_duplicate=False))
    assert set(own) <= set(dict(model.named_parameters(remove_duplicate=False)))
    assert len({id(value) for value in own.values()}) == 3
    assert [value.requires_grad for name, value in own.items() if "mid" not in name] == [False] * (len(own) - 2)
    assert not {value.data_ptr() for value in own.values()} & {value.data_ptr() for value in model.parameters()}
    assert program.persistent == {"shift"}
    assert "scale" not in program.module.state_dict()
    assert "shift" in program.module.state_dict()


class ReadsLater(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change, self.fc, self.relu = change, nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.fc(x)
        y = self.change(self, x)
        return x * 3 + y


CHANGES = {
    "module": lambda m, x: m.relu(x),
    "function": lambda m, x: F.relu(x, True),
    "keyword": lambda m, x: F.leaky_relu(x, inplace=True),
    "method": lambda m, x: x.clamp_(min=0.1),
    "underscore": lambda m, x: torch.relu_(x),
    "chain": lambda m, x: x.mul_(2).add_(1),
    "view": lambda m, x: x[:, :2].relu_().sum(1, keepdim=True),
}


@pytest.mark.parametrize("rung", [SYMBOLIC, VALUES, EXPORT])
@pytest.mark.parametrize("name", CHANGES)
def test_in_place_then_read(name, rung, monkeypatch):
    monkeypatch.setattr(ladder_module, "RUNGS", (rung,))
    model, sample = ReadsLater(CHANGES[name]), torch.randn(3, 4)
    program = trace(model, sample)
    reproduces(program, model, sample, (2, 3))
    assert bool(program.mutators) == (name == "view")
    assert model.relu.inplace


def through_a_view(model, x):
    view = x[:, :2]
    x.clamp_(max=100.0)
    return view


def through_its_base(model, x):
    x[:, :2].clamp_(max=100.0)
    return x * 2


def through_an_idle_call(model, x):
    y = model.idle(x)
    y.clamp_(max=100.0)
    return x * 2


def through_a_reshape(model, x):
    y = x.reshape(-1, 2)
    x.clamp_(max=100.0)
    return y.reshape(-1, 4)


def beside(model, x):
    first, second = x.chunk(2, 1)
    return torch.cat([first.clamp_(max=100.0), second], 1)


def beside_an_expanded_one(model, x):
    first, second = x[:, :2], x[:1, 2:].expand(x.shape[0], 2)
    return first.clamp_(max=100.0) + second


def at_two_calls(model, x):
    y, z = x * 2, x * 3
    view = z[:, :2]
    return model.cap(y).sum(1, keepdim=True) + model.cap(z) + view.sum(1, keepdim=True)


class NotShown(nn.Module):
    """A write that moderate inputs do not show."""

    def __init__(self, change):
        super().__init__()
        self.change, self.idle, self.cap = change, nn.Dropout(), nn.Hardtanh(-100.0, 100.0, inplace=True)

    def forward(self, x):
        return self.change(self, x * 1.5)


@pytest.mark.parametrize(
    ("change", "kept"),
    [(through_a_view, 1), (through_its_base, 1), (through_an_idle_call, 1), (through_a_reshape, 1), (beside, 0),
     (beside_an_expanded_one, 0),
     (at_two_calls, 2)],
)  # fmt: skip
def test_in_place_that_the_sample_does_not_show(change, kept):
    model = NotShown(change).eval()
    program = trace(model, torch.randn(3, 4))
    assert len(program.mutators) == kept
    large = 1000 * torch.randn(5, 4)
    assert torch.equal(program.module(large.clone()), model(large.clone()))


def test_in_place_on_the_input_spares_the_callers_tensor():
    model, sample = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)), torch.randn(3, 4)
    before = sample.clone()
    program = trace(model, sample)
    assert torch.equal(sample, before)
    assert torch.equal(program.call.args[0], before)


def snapshot(model):
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
    return copy.deepcopy(model.state_dict()), hooks, [id(value) for value in model.parameters()]


def test_the_model_and_the_random_state_are_untouched():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(inplace=True))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    model.train()
    model[1].eval()
    state, hooks, ids = snapshot(model)
    random, flag = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    program = trace(model, IMAGE)
    after, hooks_after, ids_after = snapshot(model)
    assert all(torch.equal(state[key], after[key]) for key in state)
    assert (hooks, ids) == (hooks_after, ids_after)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled() is flag
    assert torch.is_grad_enabled()
    assert not any(module.training for module in program.module.modules())
    assert not any(m._forward_hooks for m in program.module.modules())


def test_quiet_execution_restores_after_an_error():
    torch.backends.mha.set_fastpath_enabled(True)
    random = torch.get_rng_state()

    with pytest.raises(KeyError), quiet_execution():
        raise KeyError(torch.rand(3), torch.backends.mha.get_fastpath_enabled())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(random, torch.get_rng_state())


class Hooked(nn.Module):
    """Returns what a hook on its inner block collects."""

    def __init__(self):
        super().__init__()
        self.block, self.collected = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), []
        self.block.register_forward_hook(functools.partial(collect, self))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        self.collected = []
        self.block(x)
        return self.head(self.collected[0])


def collect(owner, module, args, output):
    owner.collected.append(output)


@pytest.mark.parametrize("where", ["leaf", "block"])
def test_a_hook_that_changes_the_output_is_traced(where):
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    (model[0][0] if where == "leaf" else model[0]).register_forward_hook(lambda module, args, output: output + 1)
    program = trace(model, torch.randn(2, 3))
    assert program.rung == ("export" if where == "leaf" else "symbolic")
    assert not any(m._forward_hooks for m in program.module.modules())
    assert len(program.failures) == (5 if where == "leaf" else 3)


def test_what_a_hook_collects_is_traced():
    model = Hooked()
    program = trace(model, torch.randn(2, 3))
    x = torch.randn(4, 3)
    torch.testing.assert_close(program.module(x), model(x))
    assert "(forward hooks kept)" not in program.failures[0]


def test_a_hook_that_counts_is_an_error():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    count = iter(range(100))
    model[0].register_forward_hook(lambda module, args, output: output + next(count))
    with pytest.raises(
        TraceError, match=says("does not always see forward hooks, found on `0`: move what a hook does")
    ):
        trace(model, torch.randn(2, 3))


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": torch.nn.utils.weight_norm,
    "old spectral_norm": torch.nn.utils.spectral_norm,
    "pruned": lambda m: torch.nn.utils.prune.random_unstructured(m, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("norm", NORMS)
def test_parametrisations_are_folded(norm):
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[norm](nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2))
    model(torch.randn(2, 4)).sum().backward()
    program = trace(model, torch.randn(2, 4))
    assert sorted(name for name, _ in program.module.named_parameters()) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert all(value.requires_grad for value in program.module.parameters())
    with quiet_execution():
        x = torch.randn(5, 4)
        torch.testing.assert_close(program.module(x), model.eval()(x))


def test_graph_modules_and_wrappers_are_traced():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    sample = torch.randn(2, 3)
    first = trace(model, sample)
    again = trace(first.module, sample)
    assert again.rung == SYMBOLIC
    reproduces(again, model, sample)
    reproduces(trace(nn.DataParallel(model), sample), model, sample)
    exported = torch.export.export(model, (sample,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    reproduces(trace(exported, sample), model, sample, (2, 5))


def test_source_of_nodes():
    program = trace(DynamicView(), IMAGE)
    view = next(node for node in program.module.graph.nodes if node.name == "view")
    assert "test_tracing.py" in view.stack_trace


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_scripted_and_quantised_modules_are_refused():
    scripted = torch.jit.script(nn.Linear(3, 3))
    with pytest.raises(InputError, match=says("`b` must be an eager module; `b.1` is a `RecursiveScriptModule`")):
        trace(nn.Sequential(nn.ReLU(), scripted), torch.randn(2, 3), name="b")
    quantised = nn.Sequential(nn.ReLU(), torch.ao.nn.quantized.ReLU6())
    message = (
        "`a` must have floating point weights; `a.1` is a quantised `ReLU6`. Zip the models before they are quantised."
    )
    with pytest.raises(InputError, match=says(message)):
        trace(quantised, torch.randn(2, 3), name="a")


def test_what_is_no_model():
    with pytest.raises(InputError, match=says("`a` must be a `torch.nn.Module`; found `str`.")):
        trace("resnet18", IMAGE, name="a")
    with pytest.raises(InputError, match=says("`weight` of `a` is uninitialised. Run the model once")):
        trace(nn.LazyLinear(3), torch.randn(2, 3), name="a")


def test_a_model_that_does_not_run():
    with pytest.raises(InputError, match=says("`a` must run on `sample_input`; it raised RuntimeError: ")):
        trace(nn.Linear(3, 3), torch.randn(2, 4), name="a")


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("a lock cannot be copied")


def test_a_model_that_cannot_be_copied():
    message = (
        "`a` must be copyable, so that the original is left alone; `copy.deepcopy` raised TypeError: a lock cannot be"
    )
    with pytest.raises(TraceError, match=says(message)):
        trace(Uncopyable(3, 3), torch.randn(2, 3), name="a")


def test_placement():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    check_placement([a, b])
    message = "`weight` of model 0 is on cpu, `weight` of model 1 on meta. Move them with `.to(device)`."
    with pytest.raises(InputError, match=says(message)):
        check_placement([a, copy.deepcopy(b).to("meta")])
    message = "`weight` of model 0 is of torch.float32, `weight` of model 1 of torch.float64. Convert them with"
    with pytest.raises(InputError, match=says(message)):
        check_placement([a, copy.deepcopy(b).double()])


def test_double_precision_is_compared_tightly():
    model = nn.Linear(3, 3).double()
    program = trace(model, torch.randn(2, 3, dtype=torch.float64))
    with torch.no_grad():
        program.module.weight.add_(1e-8)
    call = program.call
    assert "the output differs by" in difference(run_eager(program.module, call), run_eager(model, call))


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        (torch.ones(2), [torch.ones(2)], "a `Tensor` instead of a list of 1"),
        ((1,), [1], "a tuple of 1 instead of a list of 1"),
        ({"b": 1}, {"a": 1}, "a dict with ['b'] instead of a dict with ['a']"),
        (torch.ones(2), torch.ones(3), "(2,) of torch.float32 instead of (3,) of torch.float32"),
        (torch.ones(2).int(), torch.zeros(2).int(), "an integer output differs"),
        (torch.tensor([torch.nan, 1]), torch.tensor([1, torch.nan]), "differs by inf|non-finite values"),
        (3, 4, "an output that is no tensor differs"),
        (3, Pair(1, 2), "the output is a `int` instead of a `Pair`"),
    ],
)
def test_differences_are_named(found, expected, message):
    reason = difference(found, expected)
    assert any(part in reason for part in message.split("|"))
    assert difference(expected, expected) is None


def hugging_face(kind, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
    if kind == "gpt2":
        options = {
            "vocab_size": 50,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        } | options
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
    config = transformers.LlamaConfig(vocab_size=50, num_key_value_heads=1, use_cache=False, **sizes)
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_transformers(kind):
    model = hugging_face(kind, use_cache=False)
    ids = torch.randint(0, 50, (2, 7))
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if kind == "bert" else {"input_ids": ids}
    program = trace(model, sample)
    assert program.rung == VALUES
    reproduces(program, model, sample)
    with quiet_execution():
        doubled = copy.deepcopy(program.module).double()(**sample)
        assert doubled[0].dtype is torch.float64


def test_a_cache_as_output_is_rebuilt():
    model = hugging_face("gpt2")
    program = trace(model, torch.randint(0, 50, (2, 7)))
    tokens = torch.randint(0, 50, (3, 7))
    with quiet_execution():
        found, expected = program.module(tokens), model.eval()(tokens)
    assert type(found.past_key_values) is type(expected.past_key_values)
    torch.testing.assert_close(found.past_key_values.layers[1].keys, expected.past_key_values.layers[1].keys)
