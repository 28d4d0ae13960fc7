"""clp train: the configuration from a file, a run and options, and what it does with it."""

from collections.abc import Sequence

import tyro
from tqdm import tqdm

from clp.data.paths import home_expanded
from clp.training.config import CLPConfig, load_config


def run(argv: Sequence[str]) -> None:
    """clp train [--config FILE] [--option ...]: train one policy for every trade-off."""
    argv, config = _take_config(argv)

    def parsed(default: CLPConfig) -> CLPConfig:
        return tyro.cli(
            CLPConfig,
            prog="clp train",
            args=argv,
            default=default,
            description="Train one policy for every trade-off between the rewards. --config FILE "
            "reads the same options from YAML; options on the command line win. With --resume "
            "and without --config they are those of the run; only what is given may differ.",
        )

    given, config = config is not None, parsed(config or CLPConfig())
    folder = home_expanded(config.output_dir)
    if config.resume and not given and (folder / "config.yaml").is_file():
        config = parsed(CLPConfig.of_run(folder))
    elif config.resume and not given and not (folder / "clp.json").is_file():
        from clp.training.run_folder import MAY_CHANGE

        # A job that is started again and again gives --resume with all options of its run.
        also = {name: getattr(config, name) for name in (*MAY_CHANGE, "max_steps")}
        if config == CLPConfig(**also):
            raise ValueError(
                f"{folder} holds no run to resume, and no options of a new one are given"
            )
    from clp.training.checkpoint import checkpoints
    from clp.training.trainer import CLPTrainer

    trainer = CLPTrainer(args=config)
    try:
        trainer.train()
    except FloatingPointError as error:
        raise ValueError(str(error)) from error
    except KeyboardInterrupt:
        found = checkpoints(trainer.run)
        hint = "there is no checkpoint yet: --resume begins at step 1"
        if found:
            hint = f"--resume goes on from {found[-1].name}"
        raise KeyboardInterrupt(hint) from None
    tqdm.write(f"policy, metrics and adapters: {config.output_dir}")


def _take_config(argv: Sequence[str]) -> tuple[list[str], CLPConfig | None]:
    """The arguments without --config FILE (or --config=FILE), and what the file holds."""
    rest, files, arguments = [], [], iter(argv)
    for argument in arguments:
        option, given, value = argument.partition("=")
        if option == "--config":
            files.append(value if given else next(arguments, ""))
        else:
            rest.append(argument)
    if not all(files):
        raise ValueError("--config needs the path of a YAML file")
    if len(files) > 1:
        raise ValueError(f"--config must be given once, got {' and '.join(files)}")
    return rest, load_config(home_expanded(files[0])) if files else None
