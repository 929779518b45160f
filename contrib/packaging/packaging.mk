# SPDX-License-Identifier: LGPL-2.1-or-later
# Included by the Makefile: installing, and the Debian package.
DESTDIR ?= /
PREFIX ?= /usr/local
PYTHON ?= /usr/bin/python3

.PHONY: install
install: venv ## into DESTDIR and PREFIX (/usr/local): the program, its units, its generator
	@$(VENV)/bin/python contrib/packaging/install.py --destdir "$(DESTDIR)" --prefix "$(PREFIX)" --python "$(PYTHON)"

.PHONY: uninstall
uninstall: venv ## remove it again; the state directory stays
	@$(VENV)/bin/python contrib/packaging/install.py --uninstall --destdir "$(DESTDIR)" --prefix "$(PREFIX)"

.PHONY: deb
deb: venv ## a Debian package in dist/, for Debian 13 and later (VERSION=)
	@$(VENV)/bin/python contrib/packaging/deb.py dist $(VERSION)
