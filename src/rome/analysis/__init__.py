"""What finished runs are asked afterwards: which may be compared, what attacks did to images, where gates send them."""
