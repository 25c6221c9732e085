// Package gen anchors the module of generated code; the packages below allowednets/ are made by `make generate`.
package gen
