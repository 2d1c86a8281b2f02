"""Solutions of the convection-diffusion equation behind paper 000 (section 2.2, eq. 8, figure 2).

u_t + v · ∇u + σ²/2 Δu = 0 on the unit square with periodic boundaries, u(x, 1) = f(x), solved
backwards to t = 0. By the Feynman-Kac formula u(x, 0) = E[f(X(1))], X(0) = x, dX = v dt + σ dB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from robbench.figures import (
    COLUMN,
    Drawing,
    Fields,
    Rows,
    Sources,
    canvas,
    checked,
    drawings,
)
from robbench.figures.styles import SMALL, TEXT
from robbench.papers.paper import Strict

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

Field2 = NDArray[np.float64]  # values on the grid: (N, N), [i, j] at x = i / N, y = j / N
TERMINAL = "terminal condition"
ROUGHNESS = "roughness"
ORDER = 8  # of the spectral viscosity: what is resolved is left alone


class Problem(Strict):
    """What `convection-diffusion` solves.

    points: per side, 1 / Δx. step: Δt. velocity_mesh, terminal_mesh: points per side at which v,
    uniform in [-1, 1], and f are drawn; bilinear between them, so that both stay in that range and
    v is Lipschitz, as Theorem 1 of the paper wants it. viscosity: the rate at which the finest wave
    is damped; less, the coarser the wave, by the eighth power. every: the grid points that are kept
    as data.
    """

    sigmas: tuple[Annotated[float, Field(ge=0)], ...] = (0.0, 0.01, 0.1)
    points: Annotated[int, Field(ge=4, multiple_of=2)] = 128
    step: Annotated[float, Field(gt=0, le=1)] = 1e-3
    velocity_mesh: Annotated[int, Field(ge=1)] = 5
    terminal_mesh: Annotated[int, Field(ge=1)] = 10
    viscosity: Annotated[float, Field(ge=0)] = 100.0
    every: Annotated[int, Field(ge=1)] = 2
    seed: int = 0


def bilinear(values: Field2, points: int) -> Field2:
    """Values on a coarse periodic mesh (M, M), as a function on the grid (N, N)."""
    mesh = len(values)
    place = np.arange(points) * mesh / points
    left = place.astype(int)
    right, share = (left + 1) % mesh, place - left
    rows = values[left] * (1 - share)[:, None] + values[right] * share[:, None]
    return rows[:, left] * (1 - share) + rows[:, right] * share


def waves(points: int) -> tuple[Field2, Field2]:
    """Wave numbers 2π k along x and y, for rfft2; (N, N / 2 + 1)."""
    along_x = 2 * np.pi * np.fft.fftfreq(points, 1 / points)
    along_y = 2 * np.pi * np.fft.rfftfreq(points, 1 / points)
    x, y = np.meshgrid(along_x, along_y, indexing="ij")
    return x, y


def gradient(points: int) -> NDArray[np.complex128]:
    """What Fourier coefficients are multiplied by for ∂/∂x and ∂/∂y, (2, N, N / 2 + 1).

    The finest wave has none: a real function on the grid has no phase of it.
    """
    along = np.stack(waves(points))
    return 1j * np.where(np.abs(along) < np.pi * points, along, 0)


def solve(
    terminal: Field2, velocity: Field2, sigma: float, step: float, viscosity: float = 0.0
) -> Field2:
    """u(x, 0) on the grid, of f (N, N) and a steady v (2, N, N).

    Pseudo-spectral: derivatives by FFT, products on the grid. Diffusion and the mean of v are
    exact, as factors of each wave; the rest of v goes by the Runge-Kutta method of fourth order
    between them. viscosity: see `Problem`; where σ is too small for the grid it removes what
    steepens beyond it, and what the products alias.
    """
    points = len(terminal)
    slope = gradient(points)
    x, y = waves(points)
    squares = x**2 + y**2
    mean = velocity.mean(axis=(1, 2))
    eddies = velocity - mean[:, None, None]
    damping = viscosity * (np.sqrt(squares) / (np.pi * points)) ** ORDER
    steps = round(1 / step)
    rate = np.tensordot(mean, slope, 1) - sigma**2 / 2 * squares - damping
    half = np.exp(rate / steps / 2)
    whole = half**2

    def convected(u: NDArray[np.complex128]) -> NDArray[np.complex128]:
        """Δt v · ∇u, without the mean of v."""
        slopes = np.fft.irfft2(slope * u, s=terminal.shape)
        return np.fft.rfft2((eddies * slopes).sum(axis=0)) / steps

    u = np.fft.rfft2(terminal)
    for _ in range(steps):
        a = convected(u)
        b = convected(half * (u + a / 2))
        c = convected(half * u + b / 2)
        d = convected(whole * u + half * c)
        u = whole * u + (whole * a + 2 * half * (b + c) + d) / 6
    return np.fft.irfft2(u, s=terminal.shape)


def roughness(u: Field2) -> float:
    """The root mean square of |∇u|."""
    slopes = np.fft.irfft2(gradient(len(u)) * np.fft.rfft2(u), s=u.shape)
    return float(np.sqrt((slopes**2).sum(axis=0).mean()))


def fields(problem: Problem) -> tuple[Field2, Field2]:
    """The random f (N, N) and v (2, N, N)."""
    random = np.random.default_rng(problem.seed)
    n, m = problem.terminal_mesh, problem.velocity_mesh
    terminal = bilinear(random.uniform(-1, 1, (n, n)), problem.points)
    velocity = [bilinear(random.uniform(-1, 1, (m, m)), problem.points) for _ in range(2)]
    return terminal, np.stack(velocity)


def _data(sources: Sources, arguments: Fields) -> Rows:
    """Fields at the points that are kept (u at x, y), and the roughness (y) over σ (x)."""
    problem = checked(Problem, arguments)
    terminal, velocity = fields(problem)
    rows: list[dict[str, Any]] = []
    solved = {
        sigma: solve(terminal, velocity, sigma, problem.step, problem.viscosity)
        for sigma in problem.sigmas
    }
    panels = {**{f"sigma={sigma:g}": u for sigma, u in solved.items()}, TERMINAL: terminal}
    for series, u in panels.items():
        kept = range(0, problem.points, problem.every)
        rows += [
            {
                "series": series,
                "x": i / problem.points,
                "y": j / problem.points,
                "u": round(float(u[i, j]), 4),
            }
            for i in kept
            for j in kept
        ]
    return rows + [
        {"series": ROUGHNESS, "x": sigma, "y": round(roughness(u), 4), "u": ""}
        for sigma, u in solved.items()
    ]


def _plot(rows: Rows, arguments: Fields) -> Canvas:
    panels = list(dict.fromkeys(str(row["series"]) for row in rows))
    panels.remove(ROUGHNESS)
    rough = {f"sigma={float(r['x']):g}": r["y"] for r in rows if r["series"] == ROUGHNESS}
    columns = 2
    lines = -(-len(panels) // columns)
    figure, axes = canvas(
        COLUMN, 1.75 * lines + 0.2, nrows=lines, ncols=columns, squeeze=False, sharex=True,
        sharey=True,
    )  # fmt: skip
    for axis, letter, panel in zip(axes.flat, "abcdefgh", panels, strict=False):
        u, places = _on_grid([row for row in rows if row["series"] == panel])
        edges = -places[1] / 2, 1 - places[1] / 2
        shown = axis.imshow(u.T, origin="lower", extent=edges * 2, cmap="cividis", vmin=-1, vmax=1)
        axis.contour(places, places, u.T, levels=[0], colors="white", linewidths=0.6)
        axis.tick_params(labelsize=SMALL, width=0.6, length=2.5)
        name = "u(x, 1)" if panel == TERMINAL else panel.replace("sigma=", "σ = ")
        slope = f", slope {float(rough[panel]):.1f}" if panel in rough else ""
        axis.set_title(f"({letter}) {name}{slope}", fontsize=TEXT)
        axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axis.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    bar = figure.colorbar(shown, ax=axes, shrink=0.6, aspect=30, location="bottom")
    bar.ax.tick_params(labelsize=SMALL, width=0.6, length=2.5)
    bar.set_label("u at t = 0, and at t = 1 in the last panel (white: u = 0)", fontsize=SMALL)
    return figure


def _on_grid(rows: Rows) -> tuple[Field2, Field2]:
    """u (n, n) in the order of the rows, and the places of its lines."""
    size = round(len(rows) ** 0.5)
    u = np.array([float(row["u"]) for row in rows]).reshape(size, size)
    return u, np.array([float(row["y"]) for row in rows[:size]])


drawings.add("convection-diffusion", Drawing(_data, _plot))
