"""Runs in RecBole's environment, started by harness/recbole.py: imports RecBole and nothing of ours."""

import json
import sys
import time


def main() -> None:
    """Train as RecBole's own ``run_recbole`` does, and report metrics and the seconds of each epoch."""
    import recbole
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_logger, init_seed

    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    report = sys.argv[2]
    sys.argv = sys.argv[:1]  # RecBole reads settings from the command line
    config = Config(model=task["model"], dataset=task["dataset"], config_dict=task["settings"])
    init_seed(config["seed"], True)
    init_logger(config)
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], True)
    model = get_model(config["model"])(config, train._dataset).to(config["device"])
    kind = get_trainer(config["MODEL_TYPE"], config["model"])

    seconds: dict[str, list[float]] = {"train": [], "evaluate": []}
    best: dict[str, object] = {"value": -1.0}

    class Timed(kind):  # type: ignore[misc, valid-type]
        def _train_epoch(self, *args, **options):  # type: ignore[no-untyped-def]
            begin = time.perf_counter()
            result = super()._train_epoch(*args, **options)
            seconds["train"].append(time.perf_counter() - begin)
            return result

        def _valid_epoch(self, *args, **options):  # type: ignore[no-untyped-def]
            begin = time.perf_counter()
            value, metrics = super()._valid_epoch(*args, **options)
            seconds["evaluate"].append(time.perf_counter() - begin)
            if value > best["value"]:
                # RecBole 1.2.1 cannot load its own best checkpoint with today's torch: the weights are kept here.
                state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
                best.update(value=value, metrics=metrics, epoch=len(seconds["train"]), state=state)
            print(
                len(seconds["train"]),
                round(seconds["train"][-1], 2),
                dict(metrics),
                file=sys.stderr,
                flush=True,
            )
            return value, metrics

    trainer = Timed(config, model)
    trainer.fit(train, valid, saved=False, show_progress=False)
    model.load_state_dict(best["state"])
    found = trainer.evaluate(test, load_best_model=False, show_progress=False)
    with open(report, "w") as file:
        json.dump(
            {
                "version": recbole.__version__,
                "torch": torch.__version__,
                "threads": task["threads"],
                "best_epoch": best["epoch"],
                "validation": dict(best["metrics"]),
                "test": dict(found),
                "train_seconds": seconds["train"],
                "evaluate_seconds": seconds["evaluate"],
            },
            file,
        )


if __name__ == "__main__":
    main()
