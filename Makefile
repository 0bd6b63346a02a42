PYTHON ?= python

.PHONY: check format lint types cpp-format tests build sanitize sanitize-threads

check: lint types cpp-format tests

build:
	$(PYTHON) setup.py build_ext --inplace

format:
	ruff format .
	ruff check --fix .
	clang-format -i $$(git ls-files '*.cpp' '*.h')

lint:
	ruff format --check .
	ruff check .

types:
	mypy

cpp-format:
	clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

tests:
	$(PYTHON) -m pytest

# The sanitizers of docs/safety.md, each on a build of its own under build/. PyTorch and Python are not built with them:
# the runtime is loaded before Python, and leaks are not looked for. PYTHONSAFEPATH: the checkout's own build is not meant.
SANITIZED_TESTS ?= $(addprefix tests/test_, attention.py cpu_attention.py amx_attention.py attention_weights.py \
	attention_with_weights.py softmax.py norm.py streamed_results.py feed_forward.py linear.py linear_cross_entropy.py \
	plain_calls.py plain_gradients.py varlen_attention.py paged_attention.py rotary_embedding.py embedding.py dropout.py \
	properties.py properties_rows.py concurrency.py)
runtime = $$($${CXX:-g++} -print-file-name=lib$(1).so)
sanitized = PYTHONSAFEPATH=1 PYTHONPATH=$$(echo $(CURDIR)/build/$(1)/lib*) $(PYTHON)

sanitize:
	FASTATTN_REQUIRE_CPU=1 FASTATTN_SANITIZE=address,undefined $(PYTHON) setup.py -q build --build-base build/sanitize
	LD_PRELOAD="$(call runtime,asan) $(call runtime,ubsan)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(call sanitized,sanitize) -m pytest --timeout 1200 -k "not triton and not test_memory" $(SANITIZED_TESTS)

# setarch: where addresses are laid out more randomly than the runtime expects, it does not start.
sanitize-threads:
	FASTATTN_REQUIRE_CPU=1 FASTATTN_SANITIZE=thread $(PYTHON) setup.py -q build --build-base build/sanitize-threads
	setarch -R env LD_PRELOAD="$(call runtime,tsan)" TSAN_OPTIONS="halt_on_error=1 suppressions=tests/thread_sanitizer.supp" \
	$(call sanitized,sanitize-threads) tests/threaded_ops.py
