"""X-rays as a C-arm gives them: a spine in a new posture, a polychromatic beam, implants, and a panel with its faults.

`simulate` is the entry, `stand` and `expose` are its halves. Each module holds one part as a pure function.
"""

from data_pipelines.simulation.acquisition import ArticulatedBody as ArticulatedBody
from data_pipelines.simulation.acquisition import expose as expose
from data_pipelines.simulation.acquisition import Geometry as Geometry
from data_pipelines.simulation.acquisition import Preset as Preset
from data_pipelines.simulation.acquisition import Sample as Sample
from data_pipelines.simulation.acquisition import simulate as simulate
from data_pipelines.simulation.acquisition import Stance as Stance
from data_pipelines.simulation.acquisition import stand as stand
