import math
import pytest
import torch
from torch.nn import functional as F

from cdnsr_basicsr.losses import ContrastLoss, CSDLoss
from cdnsr_basicsr.losses.contrastive_loss import contrast_loss, csd_loss, draw_others


def maps(batch=5, scale=1.):
    return {
        'relu1_1': scale * torch.rand(batch, 4, 6, 5),
        'relu5_1': scale * torch.rand(batch, 512, 3, 2),
    }


WEIGHTS = {'relu1_1': 0.25, 'relu5_1': 1.}


@pytest.mark.parametrize('batch,num', [(2, 1), (2, 4), (5, 3), (16, 4), (16, 15)])
def test_others_are_others_and_different(batch, num):
    others = draw_others(batch, num)
    assert others.shape == (batch, min(num, batch - 1))
    for i, row in enumerate(others.tolist()):
        assert i not in row and len(set(row)) == len(row) and all(0 <= j < batch for j in row)


@pytest.mark.slow
def test_others_are_drawn_evenly_at_random():
    counts = sum(F.one_hot(draw_others(4, 2)[0], 4).sum(0) for _ in range(3000))
    assert counts[0] == 0
    torch.testing.assert_close(counts[1:] / 6000, torch.full((3, ), 1 / 3), atol=0.03, rtol=0)


def test_a_single_sample_has_no_others():
    with pytest.raises(ValueError, match='at least 2 are needed'):
        draw_others(1, 4)


def test_csd_equals_golden(shared):
    for row in torch.load(shared('golden/losses.pth'), weights_only=True)['contrastive']:
        teacher, student, negatives = (
            dict(enumerate(row[f'{kind}_maps'])) for kind in ('teacher', 'student', 'negative'))
        others = torch.arange(len(negatives[0])).expand(len(student[0]), -1)
        weights = dict(enumerate(row['csd_weights']))
        loss = csd_loss(student, teacher, negatives, others, weights, 'batch')
        torch.testing.assert_close(loss, row['csd_l1'], atol=1e-5, rtol=1e-5)


def test_csd_equals_slow_loop():
    student, teacher, negatives, others = maps(), maps(), maps(), draw_others(5, 3)
    total = 0
    for b in range(5):
        for layer, weight in WEIGHTS.items():
            positive = (student[layer][b] - teacher[layer][b]).abs().mean()
            negative = sum((student[layer][b] - negatives[layer][j]).abs().mean() for j in others[b])
            total += weight * positive / (negative + 1e-7) / 5
    torch.testing.assert_close(csd_loss(student, teacher, negatives, others, WEIGHTS), total)


@pytest.mark.parametrize('reduction', ['mean', 'batch'])
def test_csd_is_zero_at_the_teacher_falls_towards_it_and_rises_towards_the_negatives(reduction):
    student, teacher, negatives, others = maps(), maps(), maps(scale=3.), draw_others(5, 1)

    def moved(target, index, amount):
        return {layer: value.lerp(target[layer][index], amount) for layer, value in student.items()}

    def loss(student):
        return csd_loss(student, teacher, negatives, others, WEIGHTS, reduction).item()

    everyone = torch.arange(5)
    assert loss(teacher) == 0
    towards_teacher = [loss(moved(teacher, everyone, amount)) for amount in (0, 0.3, 0.6, 0.9)]
    assert towards_teacher == sorted(towards_teacher, reverse=True)
    towards_negative = [loss(moved(negatives, others[:, 0], amount)) for amount in (0, 0.3, 0.6, 0.9)]
    assert towards_negative == sorted(towards_negative)


def test_csd_teaches_the_students_alone():
    students, teacher, negatives = [maps(), maps()], maps(), maps()
    for features in (*students, teacher):
        for value in features.values():
            value.requires_grad_()
    CSDLoss(layer_weights=WEIGHTS, num_negatives=2)(students, teacher, negatives).backward()
    for student in students:
        assert all(value.grad.abs().flatten(1).sum(1).min() > 0 for value in student.values())
    assert all(value.grad is None for value in teacher.values())


def test_csd_is_the_sum_over_students():
    student, teacher, negatives = maps(), maps(), maps()
    loss = CSDLoss(2., WEIGHTS, num_negatives=4)  # all others: nothing is left to chance
    one, two = loss([student], teacher, negatives), loss([student, student], teacher, negatives)
    torch.testing.assert_close(two, 2 * one)
    torch.testing.assert_close(one, 2 * csd_loss(student, teacher, negatives, draw_others(5, 4), WEIGHTS))


def test_contrast_at_the_ends():
    student = F.normalize(torch.randn(4, 8), dim=1)
    opposite = -student.unsqueeze(1).repeat(1, 3, 1)
    torch.testing.assert_close(contrast_loss(student, student, opposite, 0.05), torch.zeros(4), atol=1e-6, rtol=0)
    same = student.unsqueeze(1).repeat(1, 3, 1)
    torch.testing.assert_close(contrast_loss(student, student, same, 0.05), torch.full((4, ), math.log(4)))


def test_contrast_equals_slow_loop_and_does_not_mind_length():
    student, teacher, negatives = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 2, 8)
    for b, value in enumerate(contrast_loss(7 * student, teacher, 2 * negatives, 0.5).tolist()):
        similar = [
            math.exp(F.cosine_similarity(student[b], x, dim=0).item() / 0.5) for x in (teacher[b], *negatives[b])
        ]
        assert value == pytest.approx(-math.log(similar[0] / sum(similar)), abs=1e-5)


def test_contrast_falls_towards_the_teacher_and_rises_towards_the_negatives():
    student, teacher, negatives = torch.randn(6, 8), torch.randn(6, 8), torch.randn(6, 1, 8)
    values = [contrast_loss(student.lerp(teacher, amount), teacher, negatives, 0.1) for amount in (0, 0.4, 0.8)]
    assert (values[0] > values[1]).all() and (values[1] > values[2]).all()
    values = [contrast_loss(student.lerp(negatives[:, 0], amount), teacher, negatives, 0.1) for amount in (0, 0.4, 0.8)]
    assert (values[0] < values[1]).all() and (values[1] < values[2]).all()


def test_contrast_reaches_every_sample_of_the_golden_embeddings(shared):
    # the published loss, with its similarity across the batch, leaves them all without a gradient
    row = torch.load(shared('golden/losses.pth'), weights_only=True)['contrastive'][0]
    student = row['student_embedding'].clone().requires_grad_()
    negatives = row['negative_embedding'].expand(4, -1, -1)
    contrast_loss(student, row['teacher_embedding'], negatives, 0.1).sum().backward()
    assert (student.grad.norm(dim=1) > 1e-4).all()


def test_contrast_teaches_the_students_and_the_head_alone():
    loss = ContrastLoss(num_dim=16, num_negatives=2)
    students, teacher, negatives = [maps(), maps()], maps(), maps()
    for features in (*students, teacher):
        features['relu5_1'].requires_grad_()
    loss(students, teacher, negatives).backward()
    assert all(student['relu5_1'].grad.abs().sum() > 0 for student in students)
    assert teacher['relu5_1'].grad is None
    assert all(param.grad.abs().sum() > 0 for param in loss.head.parameters())


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_negatives=0), 'num_negatives of at least 1, but got 0'),
    (dict(temperature=0), 'temperature above 0, but got 0'),
    (dict(layer='conv'), "layer of VGG19 such as 'relu5_1', but got 'conv'"),
])
def test_wrong_arguments_of_the_contrast(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ContrastLoss(**kwargs)


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_negatives=0), 'num_negatives of at least 1, but got 0'),
    (dict(reduction='sum'), "reduction 'mean' or 'batch', but got 'sum'"),
])
def test_wrong_arguments_of_csd(kwargs, message):
    with pytest.raises(ValueError, match=message):
        CSDLoss(**kwargs)
