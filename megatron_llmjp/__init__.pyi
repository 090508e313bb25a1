from megatron_llmjp.api.conversion import Converted as Converted
from megatron_llmjp.api.conversion import convert_checkpoint as convert_checkpoint
from megatron_llmjp.api.datasets import Dataset as Dataset
from megatron_llmjp.api.datasets import load_tokenizer as load_tokenizer
from megatron_llmjp.api.datasets import open_dataset as open_dataset
from megatron_llmjp.api.errors import DatasetError as DatasetError
from megatron_llmjp.api.errors import NotInstalledError as NotInstalledError
from megatron_llmjp.api.errors import OperationError as OperationError
from megatron_llmjp.api.errors import OutOfRangeError as OutOfRangeError
from megatron_llmjp.api.errors import UserError as UserError
from megatron_llmjp.api.estimates import Estimate as Estimate
from megatron_llmjp.api.estimates import estimate_run as estimate_run
from megatron_llmjp.api.estimates import load_config as load_config
from megatron_llmjp.api.metrics import Metrics as Metrics
from megatron_llmjp.api.metrics import read_metrics as read_metrics
from megatron_llmjp.api.models import Model as Model
from megatron_llmjp.api.models import load_model as load_model
from megatron_llmjp.api.runs import Run as Run
from megatron_llmjp.api.runs import open_run as open_run
from megatron_llmjp.api.schedules import FoldSchedule as FoldSchedule
from megatron_llmjp.api.schedules import Sample as Sample
from megatron_llmjp.api.schedules import open_schedule as open_schedule

__version__: str
