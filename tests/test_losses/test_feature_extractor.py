import pytest
import torch
from torch import nn
from torchvision.models import vgg

from basicsr.archs import vgg_arch
from cdnsr_basicsr.losses import VGG19Features, feature_extractor

LAYERS = ['relu1_1', 'relu2_1', 'conv3_1']


@pytest.fixture
def weights(tmp_path):
    """A file under torchvision's names with random weights for the first layers."""
    features = vgg.make_layers(vgg.cfgs['E'])[:11]
    state = {f'features.{key}': torch.randn_like(value) / 10 for key, value in features.state_dict().items()}
    path = tmp_path / 'vgg19.pth'
    torch.save({**state, 'classifier.0.bias': torch.zeros(4)}, path)
    return path


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """No weights anywhere, no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))

    def fail(*args, **kwargs):
        raise OSError('no network')

    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)


@pytest.mark.slow
def test_it_computes_what_basicsr_computes(weights, monkeypatch):
    state = torch.load(weights, weights_only=True)

    def vgg19(pretrained):
        net = nn.Module()
        net.features = vgg.make_layers(vgg.cfgs['E'])[:11]
        net.features.load_state_dict({key[9:]: value for key, value in state.items() if key.startswith('features')})
        return net

    monkeypatch.setattr(vgg, 'vgg19', vgg19)
    monkeypatch.setattr(vgg_arch, 'VGG_PRETRAIN_PATH', 'nowhere')
    theirs = vgg_arch.VGGFeatureExtractor(LAYERS)
    ours, x = VGG19Features(LAYERS, str(weights)), torch.rand(2, 3, 33, 18)
    expected, features = theirs(x), ours(x)
    assert list(features) == LAYERS
    for layer in LAYERS:
        assert torch.equal(features[layer], expected[layer])


@pytest.mark.slow
def test_weights_from_the_usual_place(weights, offline, tmp_path):
    place = tmp_path / 'experiments' / 'pretrained_models'
    place.mkdir(parents=True)
    weights.rename(place / 'vgg19-dcbb9e9d.pth')
    state = VGG19Features(['relu1_1'], 'imagenet').vgg_net.conv1_1.weight
    saved = torch.load(place / 'vgg19-dcbb9e9d.pth', weights_only=True)['features.0.weight']
    assert torch.equal(state, saved)


@pytest.mark.slow
def test_weights_from_torchvisions_place(weights, offline, tmp_path):
    place = tmp_path / 'hub' / 'checkpoints'
    place.mkdir(parents=True)
    weights.rename(place / 'vgg19-dcbb9e9d.pth')
    VGG19Features(['relu1_1'], 'imagenet')


def test_without_weights_one_line_says_what_to_put_where(offline, tmp_path):
    with pytest.raises(ValueError) as error:
        VGG19Features(['relu1_1'], 'imagenet')
    message = str(error.value)
    assert '\n' not in message and 'no network' in message
    assert 'experiments/pretrained_models/vgg19-dcbb9e9d.pth' in message and str(
        tmp_path / 'hub/checkpoints') in message
    assert 'put https://download.pytorch.org/models/vgg19-dcbb9e9d.pth at one of these places' in message


@pytest.mark.slow
def test_wrong_weights(tmp_path):
    with pytest.raises(ValueError, match="expected 'imagenet', 'random' or a file of VGG19 weights, but 'imagnet'"):
        VGG19Features(['relu1_1'], 'imagnet')
    (tmp_path / 'broken.pth').write_bytes(b'broken')
    with pytest.raises(ValueError, match='broken.pth cannot be read'):
        VGG19Features(['relu1_1'], str(tmp_path / 'broken.pth'))
    torch.save({'features.0.weight': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='other.pth contains no weights of VGG19'):
        VGG19Features(['relu1_1'], str(tmp_path / 'other.pth'))
    with pytest.raises(ValueError, match="unknown layer 'relu9_1' of VGG19; accepted: conv1_1, "):
        VGG19Features(['relu9_1'], 'random')


def test_it_never_learns_but_lets_gradients_through():
    net, x = VGG19Features(['relu2_1'], 'random'), torch.rand(1, 3, 16, 16, requires_grad=True)
    net(x)['relu2_1'].sum().backward()
    assert x.grad.abs().sum() > 0
    assert not any(param.requires_grad for param in net.parameters())


def test_random_weights_are_always_the_same_and_draw_nothing():
    torch.manual_seed(5)
    first, drawn = VGG19Features(['relu1_1'], 'random'), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    second = VGG19Features(['relu1_1'], 'random')
    assert torch.equal(first.vgg_net.conv1_1.weight, second.vgg_net.conv1_1.weight)


def test_only_the_layers_in_use_are_built():
    names = list(VGG19Features(['relu1_2', 'conv1_1'], 'random').vgg_net._modules)
    assert names == ['conv1_1', 'relu1_1', 'conv1_2', 'relu1_2']
    assert feature_extractor.VGG_PRETRAIN_PATH == vgg_arch.VGG_PRETRAIN_PATH
