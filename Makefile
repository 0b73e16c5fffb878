# Every command makes .venv first. PYTHON=python3.12 chooses the interpreter it is made with.
# LOCK=.ci/lock.txt takes the versions that CI runs with; without it, the newest that fit.
PYTHON ?= python3
BIN := .venv/bin
PIP := -m pip --quiet --disable-pip-version-check

.PHONY: demo test check outage renewals bench mpy board-budget bench-hub scorecard chaos fuzz soak screenshot lock audit clean

demo: .venv/installed
	@$(BIN)/twin-device demo

test: .venv/installed
	$(BIN)/python -m pytest -n 4 --dist loadgroup

check: test .venv/checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The device clients beside azure-iot-device and bare paho; 1 if a bar does not hold. make bench JSON=figures.json
# keeps the figures; tests.benchmarks.plot draws them.
bench: .venv/installed
	@$(BIN)/python -m tests.benchmarks.clients $(if $(JSON),--json $(JSON))

# What one hub process holds; mosquitto beside it if it is installed.
bench-hub: .venv/installed
	@$(BIN)/python -m tests.benchmarks.hub

# The package of .mpy that boards load, in build/mpy: mpremote cp -r build/mpy/twin_device :lib/
mpy: .venv/installed
	@$(BIN)/python micropython/build.py build/mpy

# Bytes of .mpy and smallest heaps of the board's client; 1 if a budget does not hold.
board-budget: .venv/installed
	@$(BIN)/python -m tests.benchmarks.board

# 15 situations of a device's life, put to Microsoft's azure-iot-device and to this client.
scorecard: .venv/installed
	@$(BIN)/python -m tests.interop.scorecard

# Everything breaks that can, and every client has to be right again: make chaos SEED=7, or for a while, SECONDS=60.
SEED ?= 1
chaos: .venv/installed
	@$(BIN)/python -m tests.chaos.run --seed $(SEED) $(if $(SECONDS),--seconds $(SECONDS))

# 1,000 tokens are replaced under load; nothing may be lost.
renewals: .venv/installed
	@$(BIN)/python -m tests.renewals

# 10,000 simulated clients come back after an outage; draws the image in README.
outage: .venv/installed
	@$(BIN)/python -m tests.outage

# So long for each of nine targets: make fuzz MINUTES=5. An input that breaks a promise is saved in fuzz-crashers/.
fuzz: .venv/fuzzing
	@$(BIN)/python -m tests.fuzz.run --minutes $(or $(MINUTES),1) $(if $(SEED),--seed $(SEED))

# 200 clients for so long, and nothing may grow: make soak MINUTES=60. The plot is soak.svg. The environment has all
# that is in use counted, and nothing else: tests/soak.py.
soak: export PYTHONMALLOC = malloc
soak: export GLIBC_TUNABLES = glibc.malloc.tcache_count=0
soak: .venv/installed
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) install $(if $(LOCK),--constraint $(LOCK)) -e '.[test]'
	@touch $@

.venv/checks: .venv/installed
	$(BIN)/python $(PIP) install $(if $(LOCK),--constraint $(LOCK)) -e '.[check]'
	@touch $@

# atheris is guided by coverage. Where it does not install, inputs are mutated without.
.venv/fuzzing: .venv/installed
	-$(BIN)/python $(PIP) install -e '.[fuzz]'
	@touch $@

# Pins what CI installs. Make it with the oldest Python that is supported, so that it fits all: PYTHON=python3.10.
lock:
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python $(PIP) install -e '.[test,check]'
	{ echo "# What CI installs: make lock PYTHON=python3.10"; build/lock/bin/python -m pip freeze --exclude-editable; } \
		> build/lock/lock.txt
	mv build/lock/lock.txt .ci/lock.txt

# Known vulnerabilities of the pinned versions, asked over the network.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python $(PIP) install pip-audit
	build/audit/bin/pip-audit --no-deps --disable-pip --requirement .ci/lock.txt

screenshot: .venv/installed
	$(BIN)/python -m tests.screenshot

clean:
	rm -rf .venv build dist *.egg-info
