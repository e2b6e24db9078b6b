def write(found, path):
    raise NotImplementedError
