import pytest
import torch

from cdnsr_basicsr.losses import FeatureDistillLoss, KDL1Loss
from cdnsr_basicsr.losses.distill_loss import distill_pairs, kd_l1_loss


def branches(num, batch=4, size=6):
    return tuple(torch.rand(batch, 3, size, size + 1, requires_grad=True) for _ in range(num))


def maps(num, batch=4):
    return [{
        'a': torch.rand(batch, 4, 6, 5, requires_grad=True),
        'b': torch.rand(batch, 8, 3, 2, requires_grad=True)
    } for _ in range(num)]


def test_pairs():
    assert distill_pairs(3, external=False) == [(0, 1), (0, 2), (1, 2)]
    assert distill_pairs(3, external=True) == [(0, 3), (1, 3), (2, 3)]


def test_kd_equals_golden(shared):
    for row in torch.load(shared('golden/losses.pth'), weights_only=True)['routing']:
        loss = KDL1Loss(reduction='sum')(tuple(row['branch_outputs']), row['probs'])
        torch.testing.assert_close(loss, row['kd_l1_loss'], atol=1e-6, rtol=1e-5)
        mean = KDL1Loss(2.)(tuple(row['branch_outputs']), row['probs'])
        torch.testing.assert_close(mean, 2 * row['kd_l1_loss'] / len(row['probs']), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('num', [2, 3, 5])
@pytest.mark.parametrize('external', [False, True])
def test_kd_equals_slow_loop(num, external):
    outputs, weights = branches(num), torch.rand(4, num).softmax(1)
    teacher = torch.rand(4, 3, 6, 7) if external else None
    total = torch.zeros(4)
    for b in range(4):
        for i in range(num):
            for target in [teacher] if external else outputs[i + 1:]:
                total[b] += weights[b, i] * (outputs[i][b] - target[b]).abs().mean()
    torch.testing.assert_close(kd_l1_loss(outputs, weights, teacher), total)


def test_kd_at_the_ends():
    image = torch.rand(4, 3, 6, 6)
    weights = torch.rand(4, 3).softmax(1)
    assert KDL1Loss()((image, image, image), weights).item() == 0
    assert KDL1Loss()((image, image, image), weights, image).item() == 0
    hard = torch.eye(3)[[2] * 4]  # everything goes to the teacher itself
    assert KDL1Loss()(branches(3), hard).item() == 0


@pytest.mark.parametrize('external', [False, True])
def test_kd_teaches_the_students_alone(external):
    outputs, logits = branches(3), torch.randn(4, 3, requires_grad=True)
    teacher = torch.rand(4, 3, 6, 7, requires_grad=True) if external else None
    KDL1Loss()(outputs, logits.softmax(1), teacher).backward()
    assert outputs[0].grad.abs().sum() > 0 and outputs[1].grad.abs().sum() > 0
    assert (outputs[2].grad is not None) == external
    assert logits.grad is None and (teacher is None or teacher.grad is None)


def test_kd_falls_towards_the_teacher_per_sample():
    outputs, weights = [output.detach() for output in branches(2)], torch.full((4, 2), 0.5)
    far = kd_l1_loss(tuple(outputs), weights)
    nearer = outputs[0].clone()
    nearer[1] = nearer[1].lerp(outputs[1][1], 0.5)
    near = kd_l1_loss((nearer, outputs[1]), weights)
    torch.testing.assert_close(near[1], far[1] / 2)
    assert torch.equal(near[[0, 2, 3]], far[[0, 2, 3]])


@pytest.mark.parametrize('num', [2, 3, 4])
@pytest.mark.parametrize('external', [False, True])
def test_feature_loss_equals_slow_loop(num, external):
    features, weights = maps(num + external), torch.rand(4, num).softmax(1)
    loss = FeatureDistillLoss(3., {'a': 0.5, 'b': 2})(features[:-1], features[-1], weights)
    total = 0
    for b in range(4):
        for i in range(num):
            for target in [features[-1]] if external else features[i + 1:]:
                for layer, layer_weight in (('a', 0.5), ('b', 2)):
                    distance = (features[i][layer][b] - target[layer][b]).abs().mean()
                    total += 3 * weights[b, i] * layer_weight * distance / 4
    torch.testing.assert_close(loss, total)


def test_feature_loss_is_zero_at_the_teacher_and_teaches_the_students_alone():
    features, weights = maps(3), torch.rand(4, 3).softmax(1)
    loss = FeatureDistillLoss(1., {'a': 1})
    assert loss([features[0]] * 2, features[0], weights).item() == 0
    loss(features[:2], features[2], weights).backward()
    assert features[0]['a'].grad.abs().sum() > 0 and features[1]['a'].grad.abs().sum() > 0
    assert features[2]['a'].grad is None and features[0]['b'].grad is None
    nearer = [{'a': (student['a'] + features[2]['a']) / 2} for student in features[:2]]
    assert loss(nearer, features[2], weights) < loss(features[:2], features[2], weights)


def test_wrong_reduction():
    with pytest.raises(ValueError, match="reduction 'mean' or 'sum', but got 'none'"):
        KDL1Loss(reduction='none')
