curl -X 'GET' 'http://0.0.0.0:8000/v1/health/ready'
