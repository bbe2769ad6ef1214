"""Statistics gathered afresh, and nothing else touched."""

import pytest
import torch
from torch import nn

from quadric.pruning.batch_norm import reestimate_batch_norm


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.last = nn.Dropout(0.5), nn.BatchNorm1d(4, momentum=None)
        self.unused, self.plain = nn.BatchNorm1d(2), nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.plain(self.last(self.drop(x)))


def loss_fn(model, batch):
    return model(batch["x"]).square().mean()


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = Network()
    for buffer in made.unused.buffers():
        buffer.add_(3)
    loss_fn(made, {"x": torch.randn(4, 3, 8, 8)}).backward()
    return made


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, 3, 8, 8, generator=generator) + shift} for shift in range(3)]


def frozen(model):
    return {
        "modes": [each.training for each in model.modules()],
        "momenta": [each.momentum for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)],
    }


def test_statistics_are_the_averages_of_the_moments_of_batches(model, batches):
    model.train()
    model.norm.eval()  # somebody keeps it fixed while training
    before, grads = frozen(model), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    unused = [buffer.clone() for buffer in model.unused.buffers()]
    assert reestimate_batch_norm(model, iter(batches), loss_fn) is model
    assert frozen(model) == before
    assert all(torch.equal(a, b) for a, b in zip(unused, model.unused.buffers(), strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(grads, [p.grad for p in model.parameters() if p.grad is not None], strict=True)
    )
    with torch.no_grad():
        maps = [model.conv(batch["x"]) for batch in batches]
        after = []
        for x in maps:
            mean, spread = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            x = (x - mean) / (spread + model.norm.eps).sqrt()
            x = x * model.norm.weight[:, None, None] + model.norm.bias[:, None, None]
            after.append(x.relu().mean((2, 3)))  # without dropout
    for norm, inputs, axes in [(model.norm, maps, (0, 2, 3)), (model.last, after, (0,))]:
        torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(axes) for x in inputs]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([x.var(axes) for x in inputs]).mean(0))
        assert norm.num_batches_tracked == 3


def test_a_sync_norm_in_one_process():
    norm, x = nn.SyncBatchNorm(2), torch.randn(5, 2)
    reestimate_batch_norm(norm, [x], lambda model, batch: model(batch))
    torch.testing.assert_close(norm.running_mean, x.mean(0))
    torch.testing.assert_close(norm.running_var, x.var(0))


def test_a_failure_leaves_the_model_as_it_was(model, batches):
    state, before = {name: value.clone() for name, value in model.state_dict().items()}, frozen(model)

    def breaks(model, batch):
        if batch is batches[1]:
            raise ArithmeticError
        return loss_fn(model, batch)

    for given, function, error in [(batches, breaks, ArithmeticError), ([], loss_fn, ValueError)]:
        with pytest.raises(error):
            reestimate_batch_norm(model, given, function)
        assert frozen(model) == before
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("plain", [nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)])
def test_models_without_statistics_are_refused(plain):
    with pytest.raises(ValueError, match=r"no batch normalisation with running statistics: there is nothing"):
        reestimate_batch_norm(plain, [torch.ones(3, 2)], lambda model, x: model(x).sum())


def test_a_batch_that_is_not_finite_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    bad = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    with pytest.raises(ValueError, match=r"running_mean of BatchNorm1d.* would not be finite: leave out the batch"):
        reestimate_batch_norm(model, [bad], lambda model, x: model(x).sum())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
