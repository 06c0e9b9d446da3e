"""What the shop sells, to whom, and the mails it has sent them."""

from django.db import models


class Product(models.Model):
    name = models.CharField(max_length=100)
    # The table refuses a negative stock; the order view relies on that.
    stock = models.PositiveIntegerField()

    def __str__(self) -> str:
        return self.name


class Customer(models.Model):
    email = models.EmailField(unique=True)

    def __str__(self) -> str:
        return self.email


class Order(models.Model):
    product = models.ForeignKey(Product, on_delete=models.PROTECT)
    quantity = models.PositiveIntegerField()
    email = models.EmailField()

    def __str__(self) -> str:
        return f"{self.quantity} {self.product} for {self.email}"


class Delivery(models.Model):
    """One row per mail sent. Nothing is unique, so that a second run would show."""

    message_id = models.CharField(max_length=100)
    email = models.EmailField()
    sent_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        verbose_name_plural = "deliveries"

    def __str__(self) -> str:
        return self.message_id
