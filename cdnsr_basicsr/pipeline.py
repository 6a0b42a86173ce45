"""BasicSR's train_pipeline and test_pipeline, corrected to follow the option file or to report why they cannot.

For every model, ours or not: a training runs exactly total_iter iterations, values that are not finite end it before
they are saved, a folder belongs to one run at a time, and logs that cannot be written do not end it.
"""
from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import tempfile
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional

from . import load_plugins
from .files import RunLock
from .memory import keep_freed_memory
from .options import OptionError, is_first_process, one_line, resolve_options
from .options.checks import check_model_of_cdnsr, check_options
from .ranks import RankWatch


class RunFailed(RuntimeError):
    """A run that started and could not finish; one line that says where, why, and what to do."""


class NotSetUp(RuntimeError):
    """Objects could not be made from the option file; the cause says why."""


def setting_up(function: Callable) -> Callable:
    """Wraps a function that makes objects from the option file: its errors are reported as errors of that file."""

    def set_up(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (OptionError, RunFailed, NotSetUp):
            raise
        except Exception as error:  # has no common type
            raise NotSetUp(str(error)) from error

    set_up.__name__ = function.__name__
    return set_up


def run_pipeline(args: Namespace) -> int:
    """Runs BasicSR's train_pipeline or test_pipeline with the current folder as root.

    Args:
        args: Of the commands train and test: command, opt, launcher, auto_resume, debug, force_yml.

    Raises:
        OptionError: The option file, or data that it names, cannot be used.
        RunFailed: The run has ended too early.
    """
    is_train = args.command == 'train'
    opt, text = resolve_options(args.opt, args.force_yml)
    processes = _wanted_processes(args, opt)
    if processes > 1:
        return _run_processes(args, processes)
    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(RankWatch())
        try:
            load_plugins()
            from .data.checks import check_data
            setting_up(check_options)(opt, is_train)
            missing = check_model_of_cdnsr(opt, is_train)
            if missing and is_first_process():
                print(f'basicsr: warning: {missing}', file=sys.stderr)
            if not (args.auto_resume or ranks.restarted):  # else no networks are needed to start from
                from .checkpoint import check_pretrained
                check_pretrained(opt['path'])
            check_data(opt)
            import torch

            from basicsr import test, train
            if not torch.cuda.is_available():
                keep_freed_memory()
            stack.enter_context(_quiet_tensorboard_thread())
            run = _Run(args, text, ranks, stack)
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
            cause = error.__cause__ if isinstance(error, NotSetUp) and error.__cause__ else error
            if not args.debug and ranks.explain(cause):
                raise RunFailed(str(ranks.lost)) from cause
            said = f'{type(cause).__name__}: {one_line(cause)}'
            ranks.say_why(said)
            if args.debug:
                raise cause from cause.__cause__
            if isinstance(error, NotSetUp):
                raise OptionError(args.opt, f'BasicSR cannot set this up: {said} (--debug shows where)') from cause
            if isinstance(error, OSError):
                raise RunFailed(one_line(error)) from error
            raise
        ranks.part()
    return 0


def _wanted_processes(args: Namespace, opt: Mapping) -> int:
    """How many processes a run begins with: one for each GPU that it is to have. BasicSR would have one process share
    its batches among them, thread by thread, which is slower and ignores precision.
    """
    wanted = opt.get('num_gpu')
    if args.launcher != 'none' or 'RANK' in os.environ or wanted != 'auto' and not (type(wanted) is int and wanted > 1):
        return 1
    import torch
    return torch.cuda.device_count() if wanted == 'auto' else min(wanted, torch.cuda.device_count())


def _run_processes(args: Namespace, processes: int) -> int:
    """Runs the same with a process for each GPU, as torchrun does.

    Returns:
        The exit code of the first process that failed, otherwise 0.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main
    print(f'Starting a process for each of {processes} GPUs (num_gpu: 1 trains or tests on one).', flush=True)
    # torchrun's own default of one thread each is too few for what is done on the CPU
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // processes)))
    command = ['-m', 'cdnsr_basicsr', args.command, '-opt', args.opt, '--launcher', 'pytorch']
    command += ['--auto_resume'] * args.auto_resume + ['--debug'] * args.debug
    command += ['--force_yml', *args.force_yml] if args.force_yml else []
    try:
        main(['--standalone', f'--nproc_per_node={processes}', *command])
    except ChildFailedError as error:  # which has said in one line what it failed of
        return max(1, int(error.get_first_failure()[1].exitcode))
    except SignalException as error:  # the processes have been ended
        return 128 + int(error.sigval)
    return 0


@contextlib.contextmanager
def _replaced(module: Any, **attributes: Any) -> Iterator[None]:
    """Replaces attributes of a module temporarily."""
    before = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(before)


class _Run:
    """One run of a pipeline: its state, and the functions that replace BasicSR's.

    Args:
        args: Of the command.
        text: Of the option file, as it is resolved.
        ranks: The watch over the other processes.
        stack: Where what the run holds is let go of at its end.
    """

    def __init__(self, args: Namespace, text: str, ranks: RankWatch, stack: contextlib.ExitStack) -> None:
        self.args, self.ranks, self.stack = args, ranks, stack
        # BasicSR reads the options here, and copies them into the experiment, whose folder it may move away before
        self.folder = tempfile.TemporaryDirectory()
        stack.enter_context(self.folder)
        self.resolved = Path(self.folder.name, Path(args.opt).name)
        self.resolved.write_text(text, encoding='utf-8')
        self.opt: dict = {}
        self.start_epoch = self.current_iter = 0

    def of_training(self, train: Any) -> dict[str, Callable]:
        """Replacements for functions in the module basicsr.train."""
        from .data.checks import Named
        resume, create, build = train.load_resume_state, train.create_train_val_dataloader, train.build_model
        rename, init, run = train.mkdir_and_rename, train.init_tb_loggers, self
        make_dataset, copy_options = train.build_dataset, train.copy_opt_file

        def copy_opt_file(opt_file: str, experiments_root: str) -> None:
            copy_options(opt_file, experiments_root)
            run.folder.cleanup()  # a run that is killed leaves nothing

        def load_resume_state(opt: dict) -> Optional[dict]:
            run._begin(opt, opt['path']['experiments_root'])
            opt['auto_resume'] = opt['auto_resume'] or run.ranks.restarted
            state = resume(opt)
            if state is not None:
                run.start_epoch, run.current_iter = state['epoch'], state['iter']
                if run.current_iter > run.total_iter:
                    raise OptionError(
                        'train.total_iter', f"is {run.total_iter}, but {opt['path']['resume_state']} is already at "
                        f'iteration {run.current_iter}')
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

        functions = {
            function.__name__: setting_up(function)
            for function in (self._parse_options(train), load_resume_state, train.make_exp_dirs, init_tb_loggers,
                             create_train_val_dataloader, build_model)
        }
        others = (mkdir_and_rename, copy_opt_file, build_dataset, MessageLogger)
        return {**functions, **{function.__name__: function for function in others}}

    def of_test(self, test: Any) -> dict[str, Callable]:
        """Replacements for functions in the module basicsr.test."""
        from .data.checks import Named
        make, make_dataset = test.make_exp_dirs, test.build_dataset

        def make_exp_dirs(opt: dict) -> None:
            self._begin(opt, opt['path']['results_root'])
            make(opt)

        def build_dataset(opt: dict) -> Any:
            return Named(make_dataset(opt))

        functions = (self._parse_options(test), make_exp_dirs, build_dataset, test.build_dataloader, test.build_model)
        return {function.__name__: setting_up(function) for function in functions}

    def _parse_options(self, module: Any) -> Callable:
        """BasicSR's parse_options, which takes its arguments from the command line, reading the resolved file."""
        parse, args = module.parse_options, self.args
        argv = ['basicsr', '-opt', str(self.resolved), '--launcher', args.launcher]
        argv += ['--auto_resume'] * args.auto_resume + ['--debug'] * args.debug

        def parse_options(root_path: str, is_train: bool = True) -> tuple[dict, Any]:
            with _replaced(sys, argv=argv):
                return parse(root_path, is_train)

        return parse_options

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
                f"{data_opt.get('dataset_enlarge_ratio', 1)} do not fill a batch of {loader.batch_size} in each of "
                f"{self.opt['world_size']} processes; raise dataset_enlarge_ratio or lower batch_size_per_gpu")
        epochs = math.ceil((self.total_iter - self.current_iter) / len(loader))
        logger.info(f'{self.total_iter - self.current_iter} iterations to go, {len(loader)} an epoch.')
        return self.start_epoch + epochs - 1

    def _watched(self, model: Any) -> Any:
        """Makes a model report its iteration, and save and validate only finite weights."""
        step, save, validate = model.optimize_parameters, model.save, model.validation

        def optimize_parameters(current_iter: int) -> None:
            self.current_iter = current_iter
            self.ranks.iteration = current_iter
            step(current_iter)

        def checked_save(epoch: int, current_iter: int) -> None:
            if current_iter == -1 and self.current_iter != self.total_iter:
                raise RunFailed(
                    f'the data ended at iteration {self.current_iter} of {self.total_iter}; nothing is saved as '
                    'the latest network')
            self._check_networks(model)
            for key in ('models', 'training_states'):
                if self.opt['rank'] == 0 and not os.path.isdir(self.opt['path'][key]):
                    _warn(f"{self.opt['path'][key]} has disappeared and is created again.")
                    os.makedirs(self.opt['path'][key])
            save(epoch, current_iter)

        def checked_validation(loader: Any, current_iter: int, *args: Any, **kwargs: Any) -> None:
            self._check_networks(model)
            validate(loader, current_iter, *args, **kwargs)

        model.optimize_parameters, model.save, model.validation = optimize_parameters, checked_save, checked_validation
        model.resume_training = setting_up(model.resume_training)
        return model

    def _may_diverge(self) -> bool:
        return 'debug' in self.opt['name']

    def _check_losses(self, log_vars: Mapping[str, Any]) -> None:
        """Ends a training if losses that are about to be logged are not finite."""
        wrong = [name for name, value in log_vars.items() if isinstance(value, float) and not math.isfinite(value)]
        losses = [name for name in wrong if name.startswith('l_')] or wrong
        # BasicSR has means over the processes on rank 0 alone
        if losses and self.opt['rank'] == 0 and not self._may_diverge():
            self._fail(f'{losses[0]} is not finite ({log_vars[losses[0]]})')

    def _check_networks(self, model: Any) -> None:
        """Ends a training if weights of its networks are not finite."""
        import torch

        from .checkpoint import not_finite
        if self._may_diverge():
            return
        for name, net in vars(model).items():
            if not name.startswith('net_') or not isinstance(net, torch.nn.Module):
                continue
            key = not_finite(net.state_dict())
            if key is not None:
                self._fail(f'{name} contains values that are not finite in {key}')

    def _fail(self, what: str) -> None:
        states = sorted((int(path.stem) for path in Path(self.opt['path']['training_states']).glob('*.state')
                         if path.stem.isdecimal()))
        kept = f'the newest good state is that of iteration {states[-1]}' if states else 'there is no good state yet'
        raise RunFailed(f'iteration {self.current_iter}: {what}; nothing is saved, {kept}. Try a lower '
                        'train.optim_g.lr, train.warmup_iter or another precision, and check the data (--debug '
                        'continues)')

    def _tb_logger(self, init_tb_loggers: Callable, opt: dict) -> Any:
        logger = logging.getLogger('basicsr')
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _SaidOnce(  # type: ignore[method-assign]
                    f'{handler.baseFilename} cannot be written')
        try:
            tb_logger = init_tb_loggers(opt)
        except OSError as error:
            _warn(f'TensorBoard cannot be used: {one_line(error)}; training continues without it.')
            return _Silent()
        return tb_logger and _Forgiving(tb_logger)


def _warn(message: str) -> None:
    logging.getLogger('basicsr').warning(message)


class _SaidOnce:
    """Replaces a handler's handleError, which prints a traceback for every line that it cannot write."""

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
    """A TensorBoard logger that stops logging, and says so once, if its files cannot be written."""

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
    """Suppresses the traceback that TensorBoard's writing thread prints in addition to its next caller's error."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if type(args.thread).__name__ != '_AsyncWriterThread':
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
