import torch
from torch.nn import functional as F


class Distillation:
    """Gathers what the distillation losses compare. Whatever several of them need is computed once per step.

    The teacher is the most expensive branch, detached, and the others are its students; with an external teacher, all
    branches are students.

    Args:
        names (list[str]): Losses in use, out of 'kd', 'feature', 'csd' and 'cs'.
        scale (int): Upsampling factor.
        extractor (nn.Module | None): VGG19Features with the layers of the losses in use; needed for all but 'kd'.
            Default: None.
    """

    def __init__(self, names, scale, extractor=None):
        self.names, self.scale, self.extractor = names, scale, extractor

    def arguments(self, lq, routing, teacher=None):
        """Arguments of the losses.

        Args:
            lq (Tensor): of shape (b, c, h, w), in [0, 1].
            routing (Routing): What CDNSR returned for it in training.
            teacher (Tensor | None): What an external teacher made of it. Default: None.

        Returns:
            dict: Tuple of arguments by name of the loss.
        """
        if not self.names:
            return {}
        outputs, weights = routing.branch_outputs, routing.weights
        arguments = {'kd': (outputs, weights, teacher)}
        if self.extractor is not None:
            students = outputs if teacher is not None else outputs[:-1]
            teacher = outputs[-1].detach() if teacher is None else teacher
            fixed = [teacher]
            if 'csd' in self.names or 'cs' in self.names:
                fixed.append(F.interpolate(lq, scale_factor=self.scale, mode='bicubic', align_corners=False))
            student_features = self._features(students)
            with torch.no_grad():
                teacher_features, *negatives = self._features(fixed)
            arguments['feature'] = (student_features, teacher_features, weights)
            arguments['csd'] = arguments['cs'] = (student_features, teacher_features, *negatives)
        return {name: arguments[name] for name in self.names}

    def _features(self, images):
        """Features by layer of each batch of images, all in one pass."""
        features = self.extractor(torch.cat(images).expand(-1, 3, -1, -1))  # gray as colours that are equal
        parts = {layer: maps.float().chunk(len(images)) for layer, maps in features.items()}
        return [{layer: maps[i] for layer, maps in parts.items()} for i in range(len(images))]
