"""Checkpoints that say what network they are of."""
from os import path as osp

from ..checkpoint import plain, save_checkpoint


def save_described(model, net, net_label, current_iter, param_key='params'):
    """Saves BasicSR's checkpoint with network_g and scale added, complete or not at all.

    Args:
        model (BaseModel): The model, whose options describe the network.
        net (nn.Module | list[nn.Module]): Network(s) to be saved.
        net_label (str): Network label.
        current_iter (int): Current iteration, -1 for the last.
        param_key (str | list[str]): Key(s) to save the network(s) under. Default: 'params'.
    """
    nets, keys = (net, param_key) if isinstance(net, list) else ([net], [param_key])
    content = {key: model.get_bare_model(net_).state_dict() for key, net_ in zip(keys, nets)}
    content = {key: {name: param.cpu().contiguous() for name, param in state.items()} for key, state in content.items()}
    content.update(network_g=plain(model.opt['network_g']), scale=model.opt['scale'])
    name = f"{net_label}_{'latest' if current_iter == -1 else current_iter}.pth"
    save_checkpoint(content, osp.join(model.opt['path']['models'], name))
