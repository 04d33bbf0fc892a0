"""Simulated C-arm X-rays: a spine in a new posture, a polychromatic beam, implants, and a panel with its faults.

`simulate` makes one acquisition. `stand` and `expose` are its two halves; several exposures may share one `Stance`.
"""

from data_pipelines.simulation.acquisition import expose as expose
from data_pipelines.simulation.acquisition import Geometry as Geometry
from data_pipelines.simulation.acquisition import Preset as Preset
from data_pipelines.simulation.acquisition import Sample as Sample
from data_pipelines.simulation.acquisition import simulate as simulate
from data_pipelines.simulation.acquisition import Stance as Stance
from data_pipelines.simulation.acquisition import stand as stand
from data_pipelines.simulation.articulated_body import ArticulatedBody as ArticulatedBody
