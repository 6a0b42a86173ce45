"""BasicSR's train_pipeline and test_pipeline, so that they do what the option file says, or say that they could not.

For every model, ours or not: a training runs exactly total_iter iterations, values that are not finite end it before
they are saved, a folder belongs to one run at a time, and logs that cannot be written do not end it.
"""
from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import sys
import tempfile
import threading
import traceback
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional

from . import load_plugins
from .files import RunLock
from .memory import keep_freed_memory
from .options import OptionError, apply_force_yml, is_first_process, one_line, read_options
from .options.checks import check_model_of_cdnsr, check_options
from .ranks import RankWatch

# BasicSR's and our functions that turn an option file into objects
SETUP = {
    'check_options', 'parse_options', 'load_resume_state', '_load_resume_state', 'make_exp_dirs', 'init_tb_loggers',
    'build_dataset', 'build_dataloader', 'create_train_val_dataloader', 'build_model', 'resume_training'
}


class RunFailed(RuntimeError):
    """A run that was set up and could not be carried to its end; one line that says where, why, and what to do."""


def run_pipeline(args: Namespace) -> int:
    """Runs BasicSR's train_pipeline or test_pipeline with the current folder as root.

    Args:
        args: Of the commands train and test: command, opt, launcher, auto_resume, debug, force_yml.

    Raises:
        OptionError: The option file, or data that it names, cannot be used.
        RunFailed: The run has ended too early.
    """
    is_train = args.command == 'train'
    opt = read_options(args.opt)
    # BasicSR's parse_options reads sys.argv
    sys.argv = [f'basicsr {args.command}', '-opt', args.opt, '--launcher', args.launcher]
    sys.argv += ['--auto_resume'] * args.auto_resume + ['--debug'] * args.debug
    sys.argv += ['--force_yml', *args.force_yml] if args.force_yml else []
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(RankWatch())
        try:
            apply_force_yml(opt, args.force_yml)
            load_plugins()
            from .data.checks import check_data
            check_options(opt, is_train)
            missing = check_model_of_cdnsr(opt, is_train)
            if missing and is_first_process():
                print(f'basicsr: warning: {missing}', file=sys.stderr)
            if not args.auto_resume:  # what goes on from a training state needs no networks to start from
                from .checkpoint import check_pretrained
                check_pretrained(opt['path'])
            check_data(opt)
            import torch

            from basicsr import test, train
            if not torch.cuda.is_available():
                keep_freed_memory()
            sys.argv[2] = stack.enter_context(out_of_experiments(args.opt))
            stack.enter_context(_quiet_tensorboard_thread())
            run = _Run(ranks, stack)
            if is_train:
                stack.enter_context(_replaced(train, **run.of_training(train)))
                train.train_pipeline(os.getcwd())
            else:
                stack.enter_context(_replaced(test, **run.of_test(test)))
                test.test_pipeline(os.getcwd())
        except OptionError as error:
            ranks.say_why(str(error))
            raise OptionError(args.opt, str(error)) from error
        except RunFailed as error:
            ranks.say_why(str(error))
            raise
        except Exception as error:
            if not args.debug and ranks.explain(error):
                raise RunFailed(str(ranks.lost)) from error
            ranks.say_why(f'{type(error).__name__}: {one_line(error)}')
            if args.debug:
                raise
            if failed_in_setup(error):
                message = f'BasicSR cannot set this up: {type(error).__name__}: {one_line(error)} (--debug shows where)'
                raise OptionError(args.opt, message) from error
            if isinstance(error, OSError):
                raise RunFailed(one_line(error)) from error
            raise
        ranks.part()
    return 0


def failed_in_setup(error: BaseException) -> bool:
    """Whether an error was raised while an option file was turned into objects: then it is the option file's fault."""
    return any(frame.name in SETUP for frame in traceback.extract_tb(error.__traceback__))


@contextlib.contextmanager
def out_of_experiments(file: str) -> Iterator[str]:
    """An option file, or its copy if it lies in an experiment: BasicSR moves that away, or copies it onto itself."""
    folder = os.path.realpath(os.path.dirname(file))
    if not folder.startswith(os.path.realpath('experiments') + os.path.sep):
        yield file
        return
    with tempfile.TemporaryDirectory() as copies:
        yield shutil.copy(file, copies)


@contextlib.contextmanager
def _replaced(module: Any, **attributes: Any) -> Iterator[None]:
    """Gives a module other attributes for a while."""
    before = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(before)


class _Run:
    """One run of a pipeline: what it has to know of itself, and the functions of BasicSR's that it takes the place of.

    Args:
        ranks: The watch over the other processes.
        stack: Where what the run holds is let go of at its end.
    """

    def __init__(self, ranks: RankWatch, stack: contextlib.ExitStack) -> None:
        self.ranks, self.stack = ranks, stack
        self.opt: dict = {}
        self.start_epoch = self.current_iter = 0

    def of_training(self, train: Any) -> dict[str, Callable]:
        """Functions to be put into the module basicsr.train."""
        from .data.checks import Named
        resume, create, build = train.load_resume_state, train.create_train_val_dataloader, train.build_model
        rename, init, run = train.mkdir_and_rename, train.init_tb_loggers, self
        make_dataset = train.build_dataset

        def load_resume_state(opt: dict) -> Optional[dict]:
            run._begin(opt, opt['path']['experiments_root'])
            state = resume(opt)
            if state is not None:
                run.start_epoch, run.current_iter = state['epoch'], state['iter']
                if run.current_iter > run.total_iter:
                    raise OptionError(
                        'train.total_iter', f"is {run.total_iter}, but {opt['path']['resume_state']} is of iteration "
                        f'{run.current_iter} already')
            return state

        def mkdir_and_rename(path: str) -> None:  # of TensorBoard's logs
            with contextlib.suppress(OSError):  # init_tb_loggers meets it again, and can say so
                rename(path)

        def init_tb_loggers(opt: dict) -> Any:
            return run._tb_logger(init, opt)

        def create_train_val_dataloader(opt: dict, logger: logging.Logger) -> tuple:
            loader, sampler, val_loaders, _, total_iter = create(opt, logger)
            return loader, sampler, val_loaders, run._last_epoch(loader, logger), total_iter

        def build_model(opt: dict) -> Any:
            return run._watched(build(opt))

        def build_dataset(opt: dict) -> Any:
            return Named(make_dataset(opt))

        class MessageLogger(train.MessageLogger):

            def __call__(self, log_vars: dict) -> None:
                run._check_losses(log_vars)
                super().__call__(log_vars)

        functions = (load_resume_state, mkdir_and_rename, init_tb_loggers, create_train_val_dataloader, build_dataset,
                     build_model, MessageLogger)
        return {function.__name__: function for function in functions}

    def of_test(self, test: Any) -> dict[str, Callable]:
        """Functions to be put into the module basicsr.test."""
        from .data.checks import Named
        make, make_dataset = test.make_exp_dirs, test.build_dataset

        def make_exp_dirs(opt: dict) -> None:
            self._begin(opt, opt['path']['results_root'])
            make(opt)

        def build_dataset(opt: dict) -> Any:
            return Named(make_dataset(opt))

        return {'make_exp_dirs': make_exp_dirs, 'build_dataset': build_dataset}

    @property
    def total_iter(self) -> int:
        return int(self.opt['train']['total_iter'])

    def _begin(self, opt: dict, folder: str) -> None:
        self.opt = opt
        self.ranks.start(opt['rank'], opt['world_size'])
        if opt['rank'] == 0:
            self.stack.enter_context(RunLock(Path(folder)))

    def _last_epoch(self, loader: Any, logger: logging.Logger) -> int:
        """The epoch in which the last iteration falls. BasicSR counts batches that it drops, and forgets that several
        GPUs share one, and that the epochs before a resume may have been shorter or longer.
        """
        data_opt = self.opt['datasets']['train']
        if len(loader) == 0:
            raise OptionError(
                'datasets.train', f"{len(loader.dataset)} images x dataset_enlarge_ratio "
                f"{data_opt.get('dataset_enlarge_ratio', 1)} fill no batch of {loader.batch_size} in each of "
                f"{self.opt['world_size']} processes; raise dataset_enlarge_ratio or lower batch_size_per_gpu")
        epochs = math.ceil((self.total_iter - self.current_iter) / len(loader))
        logger.info(f'{self.total_iter - self.current_iter} iterations to go, {len(loader)} an epoch.')
        return self.start_epoch + epochs - 1

    def _watched(self, model: Any) -> Any:
        """A model that says what iteration it is at, and saves and validates only what is finite."""
        step, save, validate = model.optimize_parameters, model.save, model.validation

        def optimize_parameters(current_iter: int) -> None:
            self.current_iter = current_iter
            self.ranks.iteration = current_iter
            step(current_iter)

        def checked_save(epoch: int, current_iter: int) -> None:
            if current_iter == -1 and self.current_iter != self.total_iter:
                raise RunFailed(
                    f'the data have ended at iteration {self.current_iter} of {self.total_iter}; nothing is saved as '
                    'the latest network')
            self._check_networks(model)
            for key in ('models', 'training_states'):
                if self.opt['rank'] == 0 and not os.path.isdir(self.opt['path'][key]):
                    _warn(f"{self.opt['path'][key]} has vanished, and is made again.")
                    os.makedirs(self.opt['path'][key])
            save(epoch, current_iter)

        def checked_validation(loader: Any, current_iter: int, *args: Any, **kwargs: Any) -> None:
            self._check_networks(model)
            validate(loader, current_iter, *args, **kwargs)

        model.optimize_parameters, model.save, model.validation = optimize_parameters, checked_save, checked_validation
        return model

    def _may_diverge(self) -> bool:
        return 'debug' in self.opt['name']

    def _check_losses(self, log_vars: Mapping[str, Any]) -> None:
        """Ends a training whose losses, as they are about to be logged, are not finite."""
        wrong = [name for name, value in log_vars.items() if isinstance(value, float) and not math.isfinite(value)]
        losses = [name for name in wrong if name.startswith('l_')] or wrong
        # BasicSR has means over the processes on rank 0 alone
        if losses and self.opt['rank'] == 0 and not self._may_diverge():
            self._fail(f'{losses[0]} is not finite ({log_vars[losses[0]]})')

    def _check_networks(self, model: Any) -> None:
        """Ends a training whose networks hold values that are not finite."""
        import torch

        from .checkpoint import not_finite
        if self._may_diverge():
            return
        for name, net in vars(model).items():
            if not name.startswith('net_') or not isinstance(net, torch.nn.Module):
                continue
            key = not_finite(net.state_dict())
            if key is not None:
                self._fail(f'{name} holds values that are not finite in {key}')

    def _fail(self, what: str) -> None:
        states = sorted((int(path.stem) for path in Path(self.opt['path']['training_states']).glob('*.state')
                         if path.stem.isdecimal()))
        kept = f'the newest good state is of iteration {states[-1]}' if states else 'there is no good state yet'
        raise RunFailed(f'iteration {self.current_iter}: {what}; nothing of it is saved, {kept}. Try a lower '
                        'train.optim_g.lr, train.warmup_iter or another precision, and look at the data (--debug goes '
                        'on)')

    def _tb_logger(self, init_tb_loggers: Callable, opt: dict) -> Any:
        logger = logging.getLogger('basicsr')
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _SaidOnce(  # type: ignore[method-assign]
                    f'{handler.baseFilename} cannot be written')
        try:
            tb_logger = init_tb_loggers(opt)
        except OSError as error:
            _warn(f'TensorBoard cannot be used: {one_line(error)}; training goes on without it.')
            return _Silent()
        return tb_logger and _Forgiving(tb_logger)


def _warn(message: str) -> None:
    logging.getLogger('basicsr').warning(message)


class _SaidOnce:
    """In the place of a handler's handleError, which prints a traceback for every line that it cannot write."""

    def __init__(self, what: str) -> None:
        self.what, self.said = what, False

    def __call__(self, record: logging.LogRecord) -> None:
        if not self.said:
            self.said = True
            print(f'{self.what}: {one_line(sys.exc_info()[1] or RuntimeError())}', file=sys.stderr)


class _Silent:
    """A TensorBoard logger that logs nothing."""

    def __getattr__(self, name: str) -> Callable:
        return lambda *args, **kwargs: None


class _Forgiving:
    """A TensorBoard logger that falls silent, and says so once, when its files cannot be written."""

    def __init__(self, tb_logger: Any) -> None:
        self.tb_logger = tb_logger

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.tb_logger, name)
        if not callable(method):
            return method

        def forgiving(*args: Any, **kwargs: Any) -> Any:
            try:
                return method(*args, **kwargs)
            except OSError as error:
                _warn(f'TensorBoard cannot write to {self.tb_logger.log_dir}: {one_line(error)}; training goes on '
                      'without it.')
                self.tb_logger = _Silent()

        return forgiving


@contextlib.contextmanager
def _quiet_tensorboard_thread() -> Iterator[None]:
    """TensorBoard's writing thread prints a traceback when it ends, beside the error that its next caller gets."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if type(args.thread).__name__ != '_AsyncWriterThread':
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
