import torch
from collections import defaultdict

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of an odd polynomial that takes singular values to about 1
STEPS = 5  # of it


def orthogonalized(matrices):
    """Matrices with the singular vectors of others, and singular values of about 1.

    Args:
        matrices (Tensor): of shape (n, rows, columns).

    Returns:
        Tensor: of shape (n, rows, columns).
    """
    upright = matrices.shape[-2] > matrices.shape[-1]
    out = matrices.mT if upright else matrices
    out = out / (out.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    first, third, fifth = NEWTON_SCHULZ
    for _ in range(STEPS):
        square = out @ out.mT
        out = torch.baddbmm(out, torch.baddbmm(square, square, square, beta=third, alpha=fifth), out, beta=first)
    return out.mT if upright else out


class Muon(torch.optim.AdamW):
    """Muon for weights that are matrices, AdamW for all others (biases, depthwise convs).

    A conv's weight is the matrix of its output channels and what they see. The step is the momentum with all singular
    values equal, so that directions which the gradient seldom takes are learnt as fast as the others.

    Reference: K. Jordan et al.: Muon: An optimizer for hidden layers in neural networks (2024). Steps are scaled to the
    size of AdamW's, so that they share a learning rate; Liu et al.: Muon is Scalable for LLM Training (2025), eq. 4.

    Args:
        params (iterable): Parameters or groups of them.
        lr (float): Learning rate. Default: 1e-3.
        betas (tuple[float]): Of AdamW. Default: (0.9, 0.99).
        eps (float): Of AdamW. Default: 1e-8.
        weight_decay (float): Decoupled, of all weights. Default: 0.
        momentum (float): Of the matrices' gradients, with Nesterov's look ahead. Default: 0.95.
        rms (float): Root mean square of a matrix's step at a learning rate of 1. Default: 0.2.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0., momentum=0.95, rms=0.2):
        if not 0 <= momentum < 1:
            raise ValueError(f'momentum: expected 0 <= momentum < 1, but got {momentum}')
        super(Muon, self).__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.momentum, self.rms = momentum, rms

    @torch.no_grad()
    def step(self, closure=None):
        """Takes a step.

        Args:
            closure (callable | None): Computes the loss once more. Default: None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = defaultdict(list)  # one product of matrices for all of a shape
            for param in group['params']:
                if param.grad is not None and param.ndim > 1 and param.shape[1] > 1:
                    alike[param.shape].append(param)
            for params in alike.values():
                self.step_matrices(params, group['lr'], group['weight_decay'])
        super(Muon, self).step()
        return loss

    def step_matrices(self, params, lr, weight_decay):
        """The step of matrices of one shape."""
        for param in params:
            if not self.state[param]:
                self.state[param].update(  # AdamW expects a number of steps in each state
                    step=torch.zeros(()),
                    momentum=torch.zeros_like(param))
        grads, momenta = [param.grad for param in params], [self.state[param]['momentum'] for param in params]
        torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
        ahead = torch.stack(grads).lerp_(torch.stack(momenta), self.momentum)
        flat = ahead.flatten(2)
        step = orthogonalized(flat) * (self.rms * max(flat.shape[1:])**0.5 * lr)
        for param, change in zip(params, step.reshape(ahead.shape)):
            param.mul_(1 - lr * weight_decay).sub_(change)
            param.grad = None  # AdamW's step has nothing to do
