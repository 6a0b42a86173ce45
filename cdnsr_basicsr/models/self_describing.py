from os import path as osp

from basicsr.utils.dist_util import master_only
from ..checkpoint import plain, save_checkpoint


class SelfDescribing:
    """Part of a model whose checkpoints describe their network."""

    @master_only
    def save_network(self, net, net_label, current_iter, param_key='params'):
        """Saves BasicSR's checkpoint with network_g and scale added, complete or not at all.

        Args:
            net (nn.Module | list[nn.Module]): Network(s) to be saved.
            net_label (str): Network label.
            current_iter (int): Current iteration, -1 for the last.
            param_key (str | list[str]): Key(s) to save the network(s) under. Default: 'params'.
        """
        nets, keys = (net, param_key) if isinstance(net, list) else ([net], [param_key])
        content = {}
        for net_, key in zip(nets, keys):
            state = self.get_bare_model(net_).state_dict()
            content[key] = {name: param.cpu().contiguous() for name, param in state.items()}
        content.update(network_g=plain(self.opt['network_g']), scale=self.opt['scale'])
        name = f"{net_label}_{'latest' if current_iter == -1 else current_iter}.pth"
        save_checkpoint(content, osp.join(self.opt['path']['models'], name))
