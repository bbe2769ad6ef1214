"""The card: its exact column against closed forms, what it leaves as it was, and what it refuses."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import oracles
import quadric
from quadric.verify import _DrawnAs, score


def squares(model, batch):
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets)


def classes(model, batch):
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def data(count=12, width=5, kinds=3):
    torch.manual_seed(1)
    return torch.randn(count, width), torch.randint(kinds, (count,))


def small_mlp(activation=nn.Tanh):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), activation(), nn.Linear(7, 3))


def of(card, name):
    return next(layer for layer in card.layers if layer.name == name)


class Network(nn.Module):
    """Something of everything that needs care: normalisation with statistics, dropout, fused attention, noise."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(11, 8)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x = self.norm(self.mix(self.token(tokens)).mean(1))
        return self.head(x + 0.1 * torch.randn_like(x))


class TestExact:
    def test_a_linear_model_by_hand(self):
        x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2, 1)
        model = nn.Linear(2, 1)
        card = quadric.verify(model, squares, (x, y))
        # The mean of (w·x + b)²: 2 mean(x_i²), and 2 for the bias.
        assert of(card, "weight").exact == pytest.approx((10.0, 20.0))
        assert of(card, "bias").exact == pytest.approx((2.0,))
        assert card.errors["hesscale"] == pytest.approx(0, abs=1e-6)

    def test_whole_tensors_of_a_network_against_one_double_backward_each(self):
        model, batch = small_mlp(), data()
        card = quadric.verify(model, classes, batch)
        model.double()
        wanted = oracles.hessian_diagonal(classes(model, (batch[0].double(), batch[1])), list(model.parameters()))
        for layer, diagonal in zip(card.layers, wanted, strict=True):
            assert layer.entries == tuple(range(diagonal.numel()))
            assert layer.exact == pytest.approx(diagonal.flatten().tolist(), rel=1e-12, abs=1e-14)

    def test_dropout_noise_and_fused_attention_are_the_same_in_float64(self):
        torch.manual_seed(0)
        model, batch = Network(), (torch.randint(11, (6, 4)), torch.randint(3, (6,)))
        card = quadric.verify(model, classes, batch, entries=3, probes=1)
        assert card.loss == pytest.approx(card.exact_loss, rel=1e-5)
        assert card.notes == (
            "the Fisher estimates are one squared gradient: the batch is too small or cannot be split",
        )

    def test_embeddings_with_sparse_gradients(self):
        model, batch = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 3)), data(kinds=3)[1:] * 2
        card = quadric.verify(model, classes, batch, probes=1)
        weight = model[0].weight
        model[0].sparse = False
        (wanted,) = oracles.hessian_diagonal(classes(model, batch), [weight])
        assert of(card, "0.weight").exact == pytest.approx(wanted.flatten().tolist(), rel=1e-4, abs=1e-6)

    def test_an_operation_that_torch_cannot_batch_is_looped_over(self):
        class Sine(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.sin()

            @staticmethod
            def backward(ctx, g):
                (x,) = ctx.saved_tensors
                assert math.isfinite(x.sum().item())  # reads a number: no batched backward can
                return g * x.cos()

        model = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.3, 0.4]]))

        def loss_fn(model, batch):
            return Sine.apply(model(batch)).sum()

        card = quadric.verify(model, loss_fn, torch.tensor([[1.0, 2.0]]), fallback="zero")
        assert of(card, "weight").exact == pytest.approx((-math.sin(1.1), -4 * math.sin(1.1)))

    def test_a_loss_linear_in_its_parameters_has_no_curvature(self):
        model = nn.Linear(2, 1)
        card = quadric.verify(model, lambda model, batch: model(batch).sum(), torch.ones(3, 2), probes=2)
        assert of(card, "weight").exact == (0.0, 0.0)
        assert card.errors["hutchinson"] == 0.0
        assert card.errors["squared_gradient"] == math.inf
        assert "∞" in str(card)


NOISE = {
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "in place": lambda x: x.clone().uniform_(2.0, 3.0),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "normal": lambda x: torch.normal(x, x.exp()),
    "multinomial": lambda x: x[torch.multinomial(x.exp(), 5)],
    "dropout": lambda x: F.dropout(x, 0.3),
    "fused dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "all dropped": lambda x: torch.native_dropout(x, 1.0, True)[0],
    "no noise": lambda x: x.cumsum(0),
}


@pytest.mark.parametrize("name", NOISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_of_float64_is_drawn_as_another_type_draws_it(name, dtype):
    x = torch.linspace(-1, 1, 64).to(dtype)
    torch.manual_seed(0)
    wanted = NOISE[name](x)
    torch.manual_seed(0)
    with _DrawnAs(dtype):
        found = NOISE[name](x.double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted.double(), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


class TestEstimates:
    def test_hutchinson_is_exact_where_the_hessian_is_diagonal(self):
        model = nn.Linear(4, 1, bias=False)
        x, y = torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, 1)
        card = quadric.verify(model, squares, (x, y), probes=1)
        assert of(card, "weight").exact == pytest.approx((0.5, 2.0, 4.5, 8.0))
        assert card.errors["hutchinson"] == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_fisher_estimates_are_of_the_given_loss_whether_mean_or_sum(self, reduction):
        model, (x, y) = small_mlp(), data()

        def loss_fn(model, batch):
            return F.cross_entropy(model(batch[0]), batch[1], reduction=reduction)

        card = quadric.verify(model, loss_fn, (x, y), window=32, rank=12)
        squared = torch.stack(
            [
                torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model[0].weight)[0].flatten()
                ** 2
                for i in range(len(x))
            ]
        )
        wanted = (squared.mean(0) if reduction == "mean" else squared.sum(0)).tolist()
        layer = of(card, "0.weight")
        assert layer.values["fisher"] == pytest.approx(wanted, rel=1e-4)
        assert layer.values["mfac"] == pytest.approx(wanted, rel=1e-4)
        # A rank as large as the number of gradients drops nothing: only the weights 0.99ⁱ differ from a mean.
        assert layer.values["ginger"] == pytest.approx(wanted, rel=0.07)
        assert card.pieces == card.examples == 12

    def test_micro_batches_count_for_their_examples(self):
        model, (x, y) = small_mlp(), data()
        card = quadric.verify(model, classes, (x, y), window=4)
        wanted = torch.zeros(35)
        for part in range(4):
            rows = slice(3 * part, 3 * part + 3)
            wanted += 3 * torch.autograd.grad(classes(model, (x[rows], y[rows])), model[0].weight)[0].flatten() ** 2 / 4
        assert of(card, "0.weight").values["mfac"] == pytest.approx(wanted.tolist(), rel=1e-4)

    def test_hesscale_is_close_where_the_squared_gradient_is_not(self):
        model, batch = small_mlp(), data(64)
        card = quadric.verify(model, classes, batch)
        assert card.errors["hesscale"] < 0.2
        scores = {estimate.key: estimate.score for estimate in card.estimates}
        assert scores["hesscale"].cosine > 0.98
        assert scores["squared_gradient"].cosine < 0.9
        assert card.errors["squared_gradient"] > 0.9
        assert [estimate.key for estimate in card.estimates] == list(card.errors)

    def test_batch_norm_couples_examples_so_pieces_are_larger(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
        card = quadric.verify(model, classes, data(32), entries=4)
        assert card.pieces == 4
        assert card.notes == ("the Fisher estimates are made of 4 micro-batches of the 32 examples",)
        assert quadric.verify(model.eval(), classes, data(32), entries=4).pieces == 32

    @pytest.mark.parametrize(
        ("batch", "examples"),
        [
            (torch.randn(6, 5), 6),
            ({"x": [torch.randn(6, 5)], "name": "six"}, 6),
            ((torch.randn(6, 5), torch.randn(3)), 1),
            (torch.randn(6, 5).requires_grad_(), 6),
        ],
    )
    def test_batches_of_any_nesting_are_split_where_they_can_be(self, batch, examples):
        def loss_fn(model, batch):
            x = batch if isinstance(batch, torch.Tensor) else batch["x"][0] if isinstance(batch, dict) else batch[0]
            return model(x).square().mean()

        assert quadric.verify(nn.Linear(5, 2), loss_fn, batch, probes=1).pieces == examples

    def test_a_model_that_refuses_single_examples_gets_larger_pieces(self):
        def loss_fn(model, batch):
            if len(batch[0]) < 2:
                raise IndexError("too few")
            return classes(model, batch)

        assert quadric.verify(small_mlp(), loss_fn, data(16), probes=1).pieces == 2


class TestLeavesNothingBehind:
    def test_model_gradients_statistics_mode_and_generators(self):
        torch.manual_seed(0)
        model, batch = Network(), (torch.randint(11, (6, 4)), torch.randint(3, (6,)))
        model.norm.eval()
        classes(model, batch).backward()
        before = copy.deepcopy(model.state_dict())
        gradients = [p.grad.clone() for p in model.parameters()]
        modes, state = [m.training for m in model.modules()], torch.get_rng_state()
        quadric.verify(model, classes, batch, entries=2, probes=1)
        assert torch.equal(torch.get_rng_state(), state)
        assert [m.training for m in model.modules()] == modes
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), key
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert torch.equal(p.grad, gradient)
            assert p.dtype == torch.float32

    def test_works_under_no_grad_and_for_models_of_half_precision(self):
        model, (x, y) = small_mlp().to(torch.bfloat16), data()
        with torch.no_grad():
            card = quadric.verify(model, classes, (x.to(torch.bfloat16), y), probes=1)
            assert not torch.is_grad_enabled()
        assert card.errors["hesscale"] < 0.3

    def test_same_seed_same_card(self):
        def told(seed):
            card = quadric.verify(small_mlp(), classes, data(), entries=8, seed=seed)
            return [(layer.entries, layer.exact, layer.values) for layer in card.layers]

        assert told(3) == told(3)
        assert told(3) != told(4)


class TestCard:
    @pytest.fixture(scope="class")
    @staticmethod
    def card():
        return quadric.verify(small_mlp(), classes, data(), entries=16)

    def test_prints_as_an_aligned_table(self, card):
        text = str(card)
        assert repr(card) == text
        lines = text.splitlines()
        assert max(map(len, lines)) <= 120
        for estimate in card.estimates:
            (line,) = [line for line in lines if line.startswith(estimate.title + "  ")]
            assert line.endswith("×")
        (head,) = [line for line in lines if line.startswith("error by tensor")]
        rows = [line for line in lines if line.startswith(("0.", "2."))]
        assert [row.split()[1] for row in rows] == ["16/35", "7/7", "16/21", "3/3"]
        assert {len(row) for row in rows} == {len(head)}

    def test_is_frozen_and_becomes_json(self, card):
        with pytest.raises(AttributeError):
            card.loss = 0.0
        told = json.loads(json.dumps(card.to_dict()))
        assert [layer["name"] for layer in told["layers"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert told["estimates"][0]["score"]["error"] == card.errors["hesscale"]
        assert told["layers"][0]["values"]["fisher"] == list(card.layers[0].values["fisher"])

    def test_counts_an_entry_for_as_many_as_it_was_drawn_from(self, card):
        off = size = 0.0
        for layer in card.layers:
            weight = math.prod(layer.shape) / len(layer.entries)
            off += weight * sum(abs(a - b) for a, b in zip(layer.values["fisher"], layer.exact, strict=True))
            size += weight * sum(map(abs, layer.exact))
        assert card.errors["fisher"] == pytest.approx(off / size)

    def test_a_choice_of_parameters_by_name_or_tensor(self, card):
        model = small_mlp()
        for choice in (["2.bias", "0.weight"], [model[2].bias, "0.weight"]):
            chosen = quadric.verify(model, classes, data(), entries=16, parameters=choice)
            assert [layer.name for layer in chosen.layers] == ["0.weight", "2.bias"]
            assert of(chosen, "0.weight").entries == of(card, "0.weight").entries
            assert of(chosen, "0.weight").exact == pytest.approx(of(card, "0.weight").exact)

    def test_frozen_and_empty_parameters_are_left_out(self):
        model = small_mlp()
        model[0].requires_grad_(False)
        model.register_parameter("none", nn.Parameter(torch.empty(0)))
        card = quadric.verify(model, classes, data(), probes=1)
        assert [layer.name for layer in card.layers] == ["2.weight", "2.bias"]

    def test_says_how_far_it_is(self):
        told = []
        quadric.verify(small_mlp(), classes, data(), probes=1, watch=lambda what, share: told.append((what, share)))
        assert told[0] == ("HesScale", 0.0)
        assert told[-1] == ("exact diagonal", 1.0)
        assert [share for _, share in told] == sorted(share for _, share in told)

    def test_a_loss_that_differs_in_float64_is_noted(self):
        def loss_fn(model, batch):
            doubled = 2.0 if batch[0].dtype == torch.float64 else 1.0
            return doubled * classes(model, batch)

        (note,) = quadric.verify(small_mlp(), loss_fn, data(), probes=1).notes
        assert "in float64" in note
        assert note in str(quadric.verify(small_mlp(), loss_fn, data(), probes=1))


class TestScore:
    def test_by_hand(self):
        found = score(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([1.0, 2.0, 1.0]))
        assert found.error == pytest.approx(5 / 4)
        assert found.cosine == pytest.approx(-3 / math.sqrt(5 * 6))
        # Ranks 3, 1, 2 and 1½, 3, 1½ about their mean 2.
        assert found.rank == pytest.approx(-1.5 / math.sqrt(2 * 1.5))

    def test_weights_are_repetitions(self):
        a, b = torch.tensor([1.0, 5.0, 2.0]), torch.tensor([2.0, 3.0, 2.0])
        repeated = score(a[[0, 0, 1, 2, 2, 2]], b[[0, 0, 1, 2, 2, 2]])
        weighted = score(a, b, torch.tensor([2.0, 1.0, 3.0]))
        for name in ("error", "cosine", "rank"):
            assert getattr(weighted, name) == pytest.approx(getattr(repeated, name))

    def test_rank_does_not_see_distortion_and_tiny_numbers_do_not_vanish(self):
        exact = torch.tensor([1e-200, 2e-200, 3e-200, 5e-200], dtype=torch.float64)
        found = score((exact * 1e200) ** 3 * 1e-200, exact)
        assert found.rank == pytest.approx(1.0)
        assert 0.9 < found.cosine < 1.0

    def test_nothing_to_compare(self):
        zero, one = torch.zeros(2), torch.ones(2)
        assert score(zero, zero).error == 0.0
        assert score(one, zero).error == math.inf
        assert math.isnan(score(zero, one).cosine)
        assert math.isnan(score(one, one).rank)


class Frozen(nn.Linear):
    def __init__(self):
        super().__init__(5, 3)
        self.requires_grad_(False)


class Holding(nn.Linear):
    def __init__(self):
        super().__init__(5, 3)
        self.held = self.weight * 2


class TestRefuses:
    @pytest.mark.parametrize(
        ("change", "kind", "message"),
        [
            ({"model": lambda x: x}, TypeError, "model is of type function: pass a torch.nn.Module"),
            ({"model": Frozen()}, ValueError, "no parameter of the model needs a gradient: set requires_grad"),
            ({"model": Holding()}, RuntimeError, "the model cannot be copied"),
            ({"loss_fn": lambda m, b: 3.0}, TypeError, "loss_fn returned float: return the loss as a tensor"),
            ({"loss_fn": lambda m, b: m(b[0])}, ValueError, r"a tensor of shape \(12, 3\) .* for example its mean"),
            ({"loss_fn": lambda m, b: m(b[0]).sum() * math.nan}, ValueError, "the loss is nan: look for the overflow"),
            ({"loss_fn": lambda m, b: m(b[0]).sum() / 0}, ValueError, "the loss is -?inf: look for the overflow"),
            ({"loss_fn": lambda m, b: m(b[0]).sum().detach()}, ValueError, "the loss has no graph: loss_fn must not"),
            (
                {"loss_fn": lambda m, b: torch.ones((), requires_grad=True) * 2},
                ValueError,
                "the loss depends on none of the parameters: loss_fn has to compute it with the model it is given",
            ),
            ({"probes": 0}, ValueError, "probes"),
            ({"entries": 1.5}, ValueError, "entries"),
            ({"window": -1}, ValueError, "window"),
            ({"rank": 0}, ValueError, "rank"),
            ({"parameters": []}, ValueError, "parameters is empty: leave it out"),
            ({"parameters": ["9.weight"]}, ValueError, "parameters holds '9.weight', which is no parameter"),
            ({"parameters": [torch.ones(2)]}, ValueError, r"parameters holds a tensor of shape \(2,\)"),
        ],
    )
    def test_in_one_sentence(self, change, kind, message):
        given = {"model": small_mlp(), "loss_fn": classes, "batch": data(), **change}
        with pytest.raises(kind, match=message) as raised:
            quadric.verify(**given)
        assert "\n" not in str(raised.value)

    def test_an_operation_without_a_rule_and_takes_the_fallback(self):
        class Cube(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x**3

            @staticmethod
            def backward(ctx, g):
                return 3 * g * ctx.saved_tensors[0] ** 2

        def loss_fn(model, batch):
            return Cube.apply(model(batch[0])).mean()

        with pytest.raises(quadric.UnsupportedOperation, match="Cube"):
            quadric.verify(small_mlp(), loss_fn, data())
        card = quadric.verify(small_mlp(), loss_fn, data(), fallback="zero")
        assert set(of(card, "2.weight").values["hesscale"]) == {0.0}

    def test_what_cannot_be_differentiated_twice(self):
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, g):
                return g

        def loss_fn(model, batch):
            return Once.apply(model(batch[0])).square().mean()

        with pytest.raises(
            RuntimeError, match=r"the exact diagonal cannot be had .*once_differentiable.* second derivative"
        ):
            quadric.verify(small_mlp(), loss_fn, data(), fallback="gauss_newton")
