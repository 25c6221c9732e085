// Package bench measures the product as a whole, next to a floor in the same run: make bench, docs/performance.md.
package bench
