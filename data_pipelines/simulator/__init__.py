"""X-rays as a C-arm gives them: a spine in a new posture, a polychromatic beam, implants, and a detector with its faults.

`simulate` is the entry, `stand` and `expose` its halves; the modules hold its parts, each a pure function that stands by
itself.
"""

from data_pipelines.simulator.assembly import Body as Body
from data_pipelines.simulator.assembly import expose as expose
from data_pipelines.simulator.assembly import Geometry as Geometry
from data_pipelines.simulator.assembly import Preset as Preset
from data_pipelines.simulator.assembly import Sample as Sample
from data_pipelines.simulator.assembly import simulate as simulate
from data_pipelines.simulator.assembly import Stance as Stance
from data_pipelines.simulator.assembly import stand as stand
