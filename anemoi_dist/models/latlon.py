"""A compact convolutional model for global latitude-longitude grids.

Padding follows the sphere: periodic in longitude, and beyond a pole the rows of the other side, half-way round. The
last layer is initialized to zero, so that an untrained model forecasts persistence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anemoi_dist.data.batch import DataSpec
from anemoi_dist.errors import ConfigError


class SphericalPad(nn.Module):
    """Pad a global latitude-longitude field by ``size`` cells on every side.

    Parameters
    ----------
    size : int
        Rows and columns to add.
    pole_rows : tuple[bool, bool]
        Whether the first and the last row lie on a pole. Such a row is the mirror's axis and is not repeated.
    """

    def __init__(self, size: int, *, pole_rows: tuple[bool, bool]) -> None:
        super().__init__()
        self.size, self.first_skip, self.last_skip = size, int(pole_rows[0]), int(pole_rows[1])

    def forward(self, field: Tensor) -> Tensor:
        """Return (..., latitude + 2 size, longitude + 2 size) of (..., latitude, longitude)."""
        size, half = self.size, field.shape[-1] // 2
        rows = field.shape[-2]
        first = field.narrow(-2, self.first_skip, size)
        last = field.narrow(-2, rows - self.last_skip - size, size)
        # Crossing the pole leads to the meridian half-way round the globe, with rows in reverse order.
        beyond = [torch.cat((row[..., half:], row[..., :half]), -1).flip(-2) for row in (first, last)]
        tall = torch.cat((beyond[0], field, beyond[1]), -2)
        return torch.cat((tall[..., -size:], tall, tall[..., :size]), -1)


class ResidualBlock(nn.Module):
    """A dilated 3 x 3 convolution, a GELU and a 1 x 1 convolution, added to the input."""

    def __init__(self, channels: int, *, dilation: int, pole_rows: tuple[bool, bool]) -> None:
        super().__init__()
        # As wide as the convolution reaches, so that the size of the field stays.
        self.pad = SphericalPad(dilation, pole_rows=pole_rows)
        self.spread = nn.Conv2d(channels, channels, 3, dilation=dilation)
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(self, field: Tensor) -> Tensor:
        """Return the same shape as ``field``, (batch, channel, latitude, longitude)."""
        return field + self.mix(F.gelu(self.spread(self.pad(field))))


class LatLonCNN(nn.Module):
    """Dilated residual convolutions on a global latitude-longitude grid.

    Parameters
    ----------
    data : DataSpec
        Grid and variables.
    hidden_channels : int
        Channels between the first and the last layer.
    dilations : Sequence[int]
        One residual block for each; the reach of the model grows with their sum.
    patch_size : int
        Side of the square of grid cells that is one position inside the model; 1 works at full resolution.
    trainable_channels : int
        Learned constant fields added to the input, for what the data does not tell of a place (coasts, mountains).

    Raises
    ------
    ConfigError
        The grid is not a global latitude-longitude grid, or a size does not fit it.
    """

    def __init__(
        self,
        data: DataSpec,
        *,
        hidden_channels: int = 32,
        dilations: Sequence[int] = (1, 2, 4, 8, 2),
        patch_size: int = 1,
        trainable_channels: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.pole_rows = _global_grid(data)
        self.patch = patch_size
        _check_sizes(self.shape, hidden_channels, dilations, patch_size)
        # A patch needs whole rows of patches; the rows that fill the last one come from beyond the pole.
        self.fill = -self.shape[0] % patch_size
        # A row of patches holds the pole row and its neighbours, so it is mirrored as a whole.
        pole_rows = self.pole_rows if patch_size == 1 else (False, False)
        num_out = len(data.prognostic)
        num_in = data.multistep_input * len(data.variables) + trainable_channels
        # Latitude first: engines that shard by rows split the first dimension, and a single channel cannot be split.
        self.place = nn.Parameter(torch.zeros(*self.shape, trainable_channels)) if trainable_channels else None
        self.pad = SphericalPad(1 + self.fill, pole_rows=self.pole_rows)
        self.encode = nn.Conv2d(num_in, hidden_channels, patch_size + 2, stride=patch_size)
        self.blocks = nn.Sequential(
            *(ResidualBlock(hidden_channels, dilation=int(d), pole_rows=pole_rows) for d in dilations)
        )
        self.decode = nn.Conv2d(hidden_channels, num_out * patch_size**2, 1)
        # Zero tendency, that is persistence: the first loss is about 1 instead of noise.
        nn.init.zeros_(self.decode.weight)
        assert self.decode.bias is not None
        nn.init.zeros_(self.decode.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast the normalised tendency.

        Parameters
        ----------
        x : torch.Tensor
            Normalised states, shape (batch, time, ensemble, grid, variable), in the dtype of the weights.

        Returns
        -------
        torch.Tensor
            Shape (batch, ensemble, grid, prognostic variable).
        """
        batch, _, ensemble = x.shape[:3]
        rows, columns = self.shape
        # Ensemble members are independent samples, input times are channels.
        field = x.permute(0, 2, 1, 4, 3).reshape(batch * ensemble, -1, rows, columns)
        if self.place is not None:
            field = torch.cat((field, self.place.permute(2, 0, 1).expand(len(field), -1, -1, -1)), 1)
        padded = self.pad(field)[..., self.fill :, self.fill : columns + 2 + self.fill]
        tendency = self.decode(self.blocks(self.encode(padded)))
        if self.patch > 1:
            tendency = F.pixel_shuffle(tendency, self.patch)[..., :rows, :]
        return tendency.reshape(batch, ensemble, -1, rows * columns).transpose(2, 3)


def _global_grid(data: DataSpec) -> tuple[tuple[int, int], tuple[bool, bool]]:
    """Return (rows, columns) and which of the first and last rows lie on a pole."""
    shape = tuple(data.field_shape)
    fix = "choose a model for this grid, or task=anemoi, whose graphs take any"
    if len(shape) != 2:
        raise ConfigError("model", "LatLonCNN", f"needs a latitude-longitude grid, not {shape}", fix=fix)
    latitudes = data.latitudes.reshape(shape)
    longitudes = data.longitudes.reshape(shape)
    rows, steps = latitudes[:, 0], np.diff(longitudes[0]) % 360
    if np.ptp(latitudes, axis=1).max() > 1e-3 or np.ptp(longitudes, axis=0).max() > 1e-3 or np.ptp(steps) > 1e-3:
        raise ConfigError("model", "LatLonCNN", "needs rows of equal latitude, evenly spaced in longitude", fix=fix)
    # A grid of cell centres ends half a row before the pole, one of corners on it.
    row_step = np.abs(np.diff(rows)).max()
    to_pole = 90 - np.abs(rows[[0, -1]])
    if abs(steps.mean() * shape[1] - 360) > 1e-2 or to_pole.max() > row_step or rows[0] * rows[-1] >= 0:
        raise ConfigError("model", "LatLonCNN", "needs a grid that covers the globe", fix=fix)
    return (shape[0], shape[1]), (bool(to_pole[0] < row_step / 4), bool(to_pole[1] < row_step / 4))


def _check_sizes(shape: tuple[int, int], hidden_channels: int, dilations: Sequence[int], patch_size: int) -> None:
    if hidden_channels < 1:
        raise ConfigError("model.hidden_channels", hidden_channels, "must be at least 1")
    if patch_size < 1 or shape[1] % (2 * patch_size):
        raise ConfigError(
            "model.patch_size", patch_size, f"must divide half of the {shape[1]} longitudes", fix="model.patch_size=1"
        )
    # Padding copies rows and columns of the field itself: it cannot be wider than the field.
    limit = min(shape) // patch_size - 1
    if not dilations or min(dilations) < 1 or max(dilations) > limit:
        raise ConfigError(
            "model.dilations", list(dilations), f"must hold numbers from 1 to {limit}, what the grid has room for"
        )
