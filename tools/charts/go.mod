module github.com/allowednets/allowednets/tools/charts

go 1.26.0

require (
	github.com/yannh/kubeconform v0.8.0 // indirect
	helm.sh/helm/v4 v4.3.1 // indirect
)
