"""Settings of a predictor that most users never change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args
from typing import Literal

from optuna_ttp._util.checks import check_choice
from optuna_ttp._util.checks import check_count
from optuna_ttp._util.checks import check_device
from optuna_ttp._util.checks import check_kind
from optuna_ttp._util.checks import check_seed
from optuna_ttp.calibration import Calibration
from optuna_ttp.dynamics import KernelGrowth
from optuna_ttp.dynamics import Sampling
from optuna_ttp.dynamics import Smoothing
from optuna_ttp.spectrum import Throughput


Method = Literal["linear", "sde", "ode"]


@dataclass(frozen=True, eq=False)
class PredictorSettings:
    """Settings of a :class:`~optuna_ttp.TrainingTimePredictor` for experts.

    Example:
        >>> settings = PredictorSettings(smoothing=Smoothing.moving_average(20), n_seeds=4)
        >>> predictor = TrainingTimePredictor(spectrum, target_fraction=0.2, settings=settings)

    Args:
        throughput:
            The seconds per training step. By default those measured with the spectrum.
        smoothing:
            A filter of the mini-batch losses: ``target_loss``, ``target_fraction`` and
            ``target_epsilon`` then refer to the smoothed loss of the mini-batches, as a training
            log shows it, instead of the loss over all samples. None by default.
        sampling:
            How mini-batches are drawn: ``"shuffle"`` takes a new permutation every epoch (the
            default), ``"replacement"`` draws every sample anew.
        method:
            How training is simulated: ``"linear"`` simulates every mini-batch on the linearised
            model (the default). ``"sde"`` and ``"ode"`` solve equation 1 of Zancato et al.
            (NeurIPS 2020) with and without noise, as a baseline.
        kernel_growth:
            The factor on the kernel as the loss falls. ``"predicted"`` takes it from the
            spectrum's probe by :meth:`~optuna_ttp.dynamics.KernelGrowth.from_probe` (the default;
            the kernel stays as it is if the spectrum has no probe, and for the paper's equation).
            ``"frozen"`` keeps the kernel as it is. A
            :class:`~optuna_ttp.dynamics.KernelGrowth` is used as given.
        saturation:
            True to slow large steps down by the saturation that the spectrum measured. Under SGD
            that makes errors before any trial a tenth to a third smaller on ImageNet weights, but
            larger on a sentence encoder, and after trials no smaller, because trials teach it
            anyway. Under Adam errors are larger: shorter steps overshoot less, so that large
            learning rates are predicted to be faster. False by default.
        n_seeds:
            The number of orders of the samples that are simulated; the prediction is their
            geometric mean. Two by default.
        seed:
            The seed of the first order. Zero by default.
        device:
            The device that simulates. The CPU by default, which is faster for small spectra.
        exact:
            True to simulate every single step, also of very slow configurations. By default
            several of their steps are simulated as one; :attr:`Prediction.strides` says how many.
        calibration:
            Corrections that were learned from observed trials, see
            :meth:`~optuna_ttp.TrainingTimePredictor.calibrated`. None by default.

    Raises:
        TypeError:
            If an argument is not of its type.
        ValueError:
            If an argument is out of its range, or does not go with ``method``.
    """

    throughput: Throughput | None = None
    smoothing: Smoothing | None = None
    sampling: Sampling = "shuffle"
    method: Method = "linear"
    kernel_growth: Literal["predicted", "frozen"] | KernelGrowth = "predicted"
    saturation: bool = False
    n_seeds: int = 2
    seed: int = 0
    device: str = "cpu"
    exact: bool = False
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        kinds = {"throughput": Throughput, "smoothing": Smoothing, "calibration": Calibration}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value is not None:
                check_kind(name, value, kind)
        check_seed(self.seed)
        for name in ("exact", "saturation"):
            check_kind(name, getattr(self, name), bool)
        check_count("n_seeds", self.n_seeds)
        check_choice("sampling", self.sampling, get_args(Sampling))
        check_choice("method", self.method, get_args(Method))
        if not isinstance(self.kernel_growth, KernelGrowth):
            check_choice("kernel_growth", self.kernel_growth, ("predicted", "frozen"))
        elif self.method != "linear":
            raise ValueError(
                f'kernel_growth belongs to method="linear" but got method={self.method!r}.'
            )
        if self.smoothing is not None and self.method != "linear":
            raise ValueError(
                f'smoothing belongs to method="linear" but got method={self.method!r}.'
            )
        if self.saturation and self.method != "linear":
            raise ValueError(
                f'saturation belongs to method="linear" but got method={self.method!r}.'
            )
        check_device(self.device)
