import torch
from torch.utils.data import DataLoader, Subset


class SharedValidation:
    """Part of a model whose processes each validate a part of the images; with BasicSR, all wait for the first.

    What a model counts while it validates is in `routing_stats`, which exists meanwhile: numbers and tensors, that are
    summed over the processes.
    """

    shares_validation = False

    def begin_validation(self, dataset_name, current_iter, tb_logger):
        self.validated = (dataset_name, current_iter, tb_logger)
        self.routing_stats = {}

    def log_routing(self):
        """Says what `routing_stats` tells of all images."""

    def nondist_validation(self, dataloader, current_iter, tb_logger, save_img):
        self.begin_validation(dataloader.dataset.opt['name'], current_iter, tb_logger)
        super(SharedValidation, self).nondist_validation(dataloader, current_iter, tb_logger, save_img)
        self.log_routing()
        del self.routing_stats

    def dist_validation(self, dataloader, current_iter, tb_logger, save_img):
        """Each process validates every world_size-th image; metrics and statistics are those of all of them."""
        dataset, rank, world_size = dataloader.dataset, self.opt['rank'], self.opt['world_size']
        part = Subset(dataset, range(rank, len(dataset), world_size))
        part.opt = dataset.opt
        metrics = list(self.opt['val'].get('metrics') or {})
        if metrics:
            self.metric_results = {metric: 0. for metric in metrics}
            self._initialize_best_metric_results(dataset.opt['name'])
        self.begin_validation(dataset.opt['name'], current_iter, tb_logger)
        if len(part) > 0:
            loader = DataLoader(part, batch_size=1, num_workers=dataloader.num_workers)
            self.shares_validation = True
            super(SharedValidation, self).nondist_validation(loader, current_iter, tb_logger, save_img)
            self.shares_validation = False

        stats = self.routing_stats
        values = [torch.tensor([len(part) * self.metric_results[metric] for metric in metrics], dtype=torch.float64)]
        values += [torch.as_tensor(value, dtype=torch.float64).flatten() for value in stats.values()]
        total = torch.cat(values).to(self.device)
        torch.distributed.all_reduce(total)
        sums, *totals = total.cpu().split([len(value) for value in values])
        self.routing_stats = {key: total.view_as(torch.as_tensor(stats[key])) for key, total in zip(stats, totals)}
        for metric, value in zip(metrics, sums.tolist()):
            self.metric_results[metric] = value / len(dataset)
            self._update_best_metric_result(dataset.opt['name'], metric, self.metric_results[metric], current_iter)
        if metrics:
            self._log_validation_metric_values(current_iter, dataset.opt['name'], tb_logger)
        self.log_routing()
        del self.routing_stats

    def _update_best_metric_result(self, dataset_name, metric, val, current_iter):
        if not self.shares_validation:  # of a part of the images
            super(SharedValidation, self)._update_best_metric_result(dataset_name, metric, val, current_iter)

    def _log_validation_metric_values(self, current_iter, dataset_name, tb_logger):
        if not self.shares_validation:
            super(SharedValidation, self)._log_validation_metric_values(current_iter, dataset_name, tb_logger)
